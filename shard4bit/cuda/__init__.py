"""The CUDA back end: fused kernels compiled by CuPy on first use."""
