"""Who sees whom: what a mask means, read from the graph that makes it."""
