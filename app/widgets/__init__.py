"""Small views: plain values in, Qt signals out."""
