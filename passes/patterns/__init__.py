"""Attention as users spell it: registered functions, found by subgraph monomorphism."""
