"""The stages of `benchmarks/gpu_end_to_end.py`; they run in the order source, pretraining, heads, measuring, report."""
