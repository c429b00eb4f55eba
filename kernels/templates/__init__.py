"""Triton templates: readable kernels with constexpr flags, of which ``generation/`` makes specialised files."""
