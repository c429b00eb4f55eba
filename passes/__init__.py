"""Graph passes: capture, match, prove, select, rewrite, lower."""
