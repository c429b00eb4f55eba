"""The benchmarks: what is measured, how, and how it is written down."""
