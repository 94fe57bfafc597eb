"""Batch: rows that decode together, each a request with its own settings, and a queue of requests over them."""
