"""Generation: the interface of transformers around the loop: its settings, streams and stop strings."""
