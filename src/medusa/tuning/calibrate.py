"""Calibration: how often each guess of each head is right where it is asked during decoding (paper 2.3.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from medusa.errors import InvalidInput
from medusa.metrics import accuracies_of, guess_ranks
from medusa.model import MedusaModel

MOST_PATHS = 1024


@dataclass(frozen=True)
class Calibration:
    """What the heads got right.

    Attributes:
        hits: [k - 1][i]: how often exactly guess i (0-based) of head k was right.
        asked: [k - 1]: of so many times.
        paths: the rank paths that came true most often, each with how often: what heads get right together, without the
            assumption that they err independently.
        positions: of so many.
    """

    hits: list[list[int]]
    asked: list[int]
    paths: list[tuple[tuple[int, ...], int]]
    positions: int

    @property
    def accuracies(self) -> list[list[float]]:
        return accuracies_of(self.hits, self.asked)

    def to_dict(self) -> dict:
        return {**asdict(self), "accuracies": self.accuracies}


def calibrate(
    model: MedusaModel,
    prompts: Sequence[Tensor],  # each (P,) long
    max_new_tokens: int = 128,
    ranks: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    on_progress: Callable[[], None] | None = None,
) -> Calibration:
    """Let the backbone continue the prompts, with Medusa's help, and score the heads on what it said.

    Args:
        temperature: 0 is greedy; otherwise continuations are drawn from the backbone's distribution.
        batch_size: prompts continued together; what is said does not depend on it but for rounding.
        on_progress: called after every prompt.
    """
    if model.heads is None:
        raise InvalidInput("this model has no heads to calibrate")
    ranks = min(ranks, model.vocab_size)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    found = []
    for first in range(0, len(prompts), batch_size):
        for prompt, ids in continuations(
            model, prompts[first : first + batch_size], max_new_tokens, seed=seed + first, **sampling
        ):
            with torch.inference_mode():
                hidden = model.hidden_states(ids[None])
            # Heads are asked from the last token of the prompt on.
            start = len(prompt) - 1
            found.append(guess_ranks(model.heads, hidden[0, start:], ids[start:], ranks))
            if on_progress:
                on_progress()
    every = torch.cat(found)
    hits = [torch.bincount(every[every[:, k] >= 0, k], minlength=ranks).tolist() for k in range(model.num_heads)]
    # Head k is not asked for the last k tokens of a text.
    asked = [sum(max(0, len(part) - k) for part in found) for k in range(model.num_heads)]
    return Calibration(hits, asked, _paths(every), len(every))


def continuations(
    model: MedusaModel, prompts: Sequence[Tensor], max_new_tokens: int, **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """Each prompt with its whole text, continued in one batch."""
    width = max(map(len, prompts))
    batch = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    output = model.generate(batch, mask, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **options)
    ends = [width + sum(lengths) for lengths in output.acceptance_lengths]
    return [
        (prompt, output.sequences[row, width - len(prompt) : end].to(model.device))
        for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True))
    ]


def _paths(ranks: Tensor) -> list[tuple[tuple[int, ...], int]]:
    """Every beginning of a row up to its first miss, counted; the most frequent, shorter before longer."""
    counts: Counter[tuple[int, ...]] = Counter()
    for row in ranks.tolist():
        path = tuple(takewhile(lambda rank: rank >= 0, row))
        counts.update(path[:depth] for depth in range(1, len(path) + 1))
    return sorted(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[:MOST_PATHS]
