"""Penalties on tokens that have occurred, for all nodes of a row at once: each counts the tokens of its own path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa.sampling import NodePaths, RowText


@dataclass(frozen=True)
class RepetitionPenalty:
    """transformers' repetition penalty: the score of a token that has occurred is divided by it, or multiplied if negative.

    Args:
        penalty: above 1 discourages repetition, below 1 encourages it.
        ignored: number of leading tokens, padding included, that do not count.
    """

    penalty: float
    ignored: int = 0

    def __call__(
        self,
        scores: Tensor,  # (N, V) float32
        text: RowText,
        paths: NodePaths | None,  # None: N = 1, and the scores follow the text
    ) -> Tensor:  # (N, V)
        vocab_size = scores.shape[1]
        ids = text.tokens[max(text.pads, self.ignored) :].expand(len(scores), -1)
        if paths is not None:
            # Behind the end of a path, its root again: a token counts once.
            ids = torch.cat([ids, paths.tokens[paths.lineage.clamp(min=0)]], 1)
        ids = ids.clamp(max=vocab_size)  # a prompt may hold tokens that the LM head has no row for: one column more
        wider = pad(scores, (0, 1))
        found = wider.gather(1, ids)
        found = torch.where(found < 0, found * self.penalty, found / self.penalty)
        return wider.scatter(1, ids, found)[:, :vocab_size]


@dataclass(frozen=True)
class OccurrencePenalty:
    """OpenAI's penalties on tokens that have been generated, the prompt not counted.

    Args:
        presence: subtracted from the score of every token that has occurred.
        frequency: subtracted once for each time that it has occurred.
    """

    presence: float = 0.0
    frequency: float = 0.0

    def __call__(
        self,
        scores: Tensor,  # (N, V) float32
        text: RowText,
        paths: NodePaths | None,
    ) -> Tensor:  # (N, V)
        counts = torch.zeros_like(scores)
        generated = text.tokens[text.prompt :].expand(len(scores), -1)
        counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=counts.dtype))
        if paths is not None:
            on_path = (paths.lineage >= 0).to(counts.dtype)
            counts.scatter_add_(1, paths.tokens[paths.lineage.clamp(min=0)], on_path)
        return scores - (counts * self.frequency + (counts > 0) * self.presence)
