"""The dense family on a GPU: plain, selective, SSA and symmetric attention through one set of generated kernels."""
