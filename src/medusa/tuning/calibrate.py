"""Calibration: how often each guess of each head is right where it is asked during decoding (paper 2.3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from medusa.errors import InvalidInput
from medusa.metrics import rank_hits
from medusa.model import MedusaModel


@dataclass(frozen=True)
class Calibration:
    """hits[k - 1][i]: how often exactly guess i (0-based) of head k was right, of asked[k - 1] times."""

    hits: list[list[int]]
    asked: list[int]

    @property
    def accuracies(self) -> list[list[float]]:
        return [[hit / max(asked, 1) for hit in row] for row, asked in zip(self.hits, self.asked, strict=True)]

    def to_dict(self) -> dict:
        return {**asdict(self), "accuracies": self.accuracies}


def calibrate(
    model: MedusaModel,
    prompts: Sequence[Tensor],  # each (P,) long
    max_new_tokens: int = 128,
    ranks: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    on_progress: Callable[[], None] | None = None,
) -> Calibration:
    """Let the backbone continue the prompts, with Medusa's help, and score the heads on what it said.

    Args:
        temperature: 0 is greedy; otherwise continuations are drawn from the backbone's distribution.
        on_progress: called after every prompt.
    """
    if model.heads is None:
        raise InvalidInput("this model has no heads to calibrate")
    ranks = min(ranks, model.vocab_size)
    hits = torch.zeros(model.num_heads, ranks, dtype=torch.long)
    asked = torch.zeros(model.num_heads, dtype=torch.long)
    for number, prompt in enumerate(prompts):
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
        ids = model.generate(prompt[None], max_new_tokens=max_new_tokens, seed=seed + number, **sampling)
        with torch.inference_mode():
            ids = ids.to(model.device)
            hidden = model.hidden_states(ids)
        # Heads are asked from the last token of the prompt on.
        start = len(prompt) - 1
        counted = torch.ones_like(ids[:, start:], dtype=torch.bool)
        got, times = rank_hits(model.heads, hidden[:, start:], ids[:, start:], counted, ranks)
        hits += got
        asked += times
        if on_progress:
            on_progress()
    return Calibration(hits.tolist(), asked.tolist())
