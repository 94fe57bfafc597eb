"""Training text: JSONL samples cut into blocks of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa.errors import InvalidInput
from medusa.training.losses import IGNORED


def read_samples(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, each with "text" or "input_ids".

    Raises:
        InvalidInput: no such file, a line that is no JSON object, or one with neither key; the line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(f"no data file {path}")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                sample = json.loads(line.decode("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise InvalidInput(f"{path}:{number} is not valid JSON: {error}") from None
            if not isinstance(sample, dict) or not ("text" in sample or "input_ids" in sample):
                raise InvalidInput(f"{path}:{number} has neither 'text' nor 'input_ids'")
            ids = sample.get("input_ids")
            if ids is None and not isinstance(sample["text"], str):
                raise InvalidInput(f"{path}:{number}: 'text' is a {type(sample['text']).__name__}, wanted a string")
            if ids is not None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
                raise InvalidInput(f"{path}:{number}: 'input_ids' is not a list of integers")
            yield sample


def load_blocks(path: str | Path, tokenizer: Any, max_length: int, vocab_size: int, shortest: int) -> list[Tensor]:
    """Every sample's token ids, cut into blocks of at most `max_length`; blocks below `shortest` teach nothing.

    Raises:
        InvalidInput: see `read_samples`; ids outside the vocabulary; or no block at all.
    """
    blocks = []
    for number, sample in enumerate(read_samples(path), 1):
        ids = sample.get("input_ids")
        if ids is None:
            ids = tokenizer(sample["text"], verbose=False)["input_ids"]
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InvalidInput(f"{path}: sample {number} has ids outside the vocabulary of {vocab_size} tokens")
        blocks += [block for block in torch.tensor(ids, dtype=torch.int32).split(max_length) if len(block) >= shortest]
    if not blocks:
        raise InvalidInput(f"{path} holds no sample of at least {shortest} tokens")
    return blocks


def collate(blocks: list[Tensor]) -> dict[str, Tensor]:
    """Right-padded `input_ids` and `labels`, (B, T) long; padding is label IGNORED and unseen by a causal model."""
    width = max(map(len, blocks))
    ids = torch.zeros(len(blocks), width, dtype=torch.long)
    labels = torch.full((len(blocks), width), IGNORED)
    for row, block in enumerate(blocks):
        ids[row, : len(block)] = block
        labels[row, : len(block)] = block
    return {"input_ids": ids, "labels": labels}
