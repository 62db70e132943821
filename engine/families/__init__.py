"""What a model family is: sizes, key maps, how its files become a network. Declares; computes nothing."""
