"""Certificates: the nodes and the normal form, computed on the same numbers."""
