"""Graphs: how they are captured, and what is known of a node without asking what attention is."""
