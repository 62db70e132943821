"""Files with weights, in and out: safetensors, and the public SVDQuant layout inside it."""
