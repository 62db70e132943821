"""A 16-bit checkpoint in, a 4-bit SVDQuant checkpoint out; one step a file, in the order they run."""
