"""Processors: what changes scores before a token is chosen, for each row and each node by itself."""
