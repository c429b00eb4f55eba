"""Specialisation: from a template with flags to one self-contained file of Triton source."""
