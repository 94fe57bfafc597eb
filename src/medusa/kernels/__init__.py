"""Kernels: linear maps of a few rows on a CPU, compiled on the machine that runs them."""
