"""The backbone: any transformers causal LM under a tree attention mask."""
