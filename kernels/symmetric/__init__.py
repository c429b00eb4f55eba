"""Symmetric attention: queries and keys share one projection; pairwise: with a matrix per head between them."""
