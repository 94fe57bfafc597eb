"""Medusa heads inside other inference engines."""
