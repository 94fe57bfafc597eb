"""Checkpoints: models found by name and loaded; heads in every format that is out there, read and written."""
