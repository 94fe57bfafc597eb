"""Prompts that nothing was trained on: the embedded model's held-out files, or a user's own."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa import EMBEDDED

HELD_OUT_FILE = EMBEDDED / "held_out.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt of the embedded model: 256 tokens of a file of the Python 3.11 standard library."""

    source: str
    split: str  # "test", or "calibration" for the tree search
    ids: Tensor  # (P,) long


def held_out_prompts(split: str = "test") -> list[Prompt]:
    """Held-out prompts that ship with the embedded model; neither its backbone nor its heads saw their files."""
    prompts = []
    for line in HELD_OUT_FILE.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["split"] == split:
            prompts.append(Prompt(record["source"], split, torch.tensor(record["input_ids"])))
    return prompts
