"""Measuring attentions: one registry of variants and of what others offer for the same, and one way to time them."""
