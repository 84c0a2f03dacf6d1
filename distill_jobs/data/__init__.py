"""Data sets a recipe can name."""
