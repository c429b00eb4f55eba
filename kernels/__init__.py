"""The maths and the kernels of every variant, one folder each."""
