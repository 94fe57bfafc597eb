"""The stages of `benchmarks/gpu_end_to_end.py`, in the order in which they run: source, pretraining, heads, measuring, report."""
