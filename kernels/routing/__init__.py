"""Routing attention: README.md says the maths, reference.py is the specification."""
