"""A pretend CUDA device: see README.md in this folder."""
