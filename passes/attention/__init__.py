"""Attention in normal form: what a match is made of."""
