"""One network a file, assembled from layers; sizes in a frozen config."""
