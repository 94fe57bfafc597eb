"""Warpers: temperature, top-k, top-p and min-p, each row with its own, as transformers applies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Warpers:
    """The plain warpers of a row, in their order; None: not applied."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __bool__(self) -> bool:
        return self != Warpers()


class RowWarpers:
    """The warpers of all rows of a batch, applied to all rows and nodes at once.

    Args:
        warpers: those of each row, B.
    """

    def __init__(self, warpers: Sequence[Warpers], device: torch.device):
        self._steps: list[tuple[Callable[..., Tensor], Tensor | None, Tensor]] = []
        for field in fields(Warpers):
            values = [getattr(own, field.name) for own in warpers]
            rows = [row for row, value in enumerate(values) if value is not None]
            if not rows:
                continue
            chosen = [values[row] for row in rows]
            if field.name == "top_p":
                chosen = [1 - value for value in chosen]  # rounded once, as in transformers
            apply = partial(_top_k, greatest=max(chosen)) if field.name == "top_k" else APPLY[field.name]
            dtype = torch.long if field.name == "top_k" else torch.float32
            at = torch.tensor(rows, device=device) if len(rows) < len(values) else None
            self._steps.append((apply, at, torch.tensor(chosen, dtype=dtype, device=device)[:, None, None]))

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __call__(
        self,
        scores: Tensor,  # (B, N, V) float32
    ) -> Tensor:  # (B, N, V)
        for apply, rows, values in self._steps:
            if rows is None:
                scores = apply(scores, values)
            else:
                scores = scores.index_copy(0, rows, apply(scores[rows], values))
        return scores


# Each takes scores (n, N, V) and a value for each row (n, 1, 1).


def _temperature(scores: Tensor, values: Tensor) -> Tensor:
    return scores / values


def _top_k(scores: Tensor, values: Tensor, greatest: int) -> Tensor:
    best = scores.topk(min(greatest, scores.shape[-1]), dim=-1).values
    place = values.clamp(max=best.shape[-1]) - 1
    return scores.masked_fill(scores < best.gather(-1, place.expand(*scores.shape[:2], 1)), -torch.inf)


def _top_p(scores: Tensor, values: Tensor) -> Tensor:
    ascending, order = scores.sort(dim=-1)
    removed = ascending.softmax(-1).cumsum(-1) <= values
    removed[..., -1] = False
    return scores.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def _min_p(scores: Tensor, values: Tensor) -> Tensor:
    p = scores.softmax(-1)
    return scores.masked_fill(p < values * p.amax(-1, keepdim=True), -torch.inf)


APPLY = {"temperature": _temperature, "top_p": _top_p, "min_p": _min_p}
