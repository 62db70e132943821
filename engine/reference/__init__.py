"""What every operation means, in plain torch: the path without a GPU, and what kernels are held to."""
