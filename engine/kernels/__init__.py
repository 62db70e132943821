"""The Python side of each kernel: check shapes, allocate, launch. CPU tensors go to the reference."""
