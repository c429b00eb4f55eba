"""How a site becomes each variant: one rule per file."""
