"""Checkpoints: heads in every format that is out there, read without being told which, and written in each."""

from medusa.checkpoints.publish import push_to_hub
from medusa.checkpoints.reader import Checkpoint, has_heads, heads_from_tensors, load_heads, open_checkpoint
from medusa.checkpoints.writer import FORMATS, save_heads, write_checkpoint

__all__ = [
    "FORMATS",
    "Checkpoint",
    "has_heads",
    "heads_from_tensors",
    "load_heads",
    "open_checkpoint",
    "push_to_hub",
    "save_heads",
    "write_checkpoint",
]
