"""The entries: one file per benchmark, each with ``run(size, tick)``."""
