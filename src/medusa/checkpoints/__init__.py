"""Checkpoints: models found by name and loaded; heads read and written in every published format."""
