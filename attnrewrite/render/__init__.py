"""Views of a Report and of the diagnostics: they read plain data and never look at a model."""
