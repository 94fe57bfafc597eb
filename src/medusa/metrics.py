"""Metrics: how often each guess of each head is right, and the acceptance length to expect from a tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medusa.heads import MedusaHeads
from medusa.trees.static import MedusaTree


def predicted(
    counted: Tensor,  # (B, T) bool: whether the token there is one to be predicted
    segments: Tensor | None,  # (B, T) long: the text each token belongs to; None: one text per row
    shift: int,
) -> Tensor:  # (B, max(0, T - shift)) bool
    """The positions from which the token `shift` places on is one to be predicted, and of the same text."""
    later = counted[:, shift:]
    return later if segments is None else later & (segments[:, shift:] == segments[:, : later.shape[1]])


@torch.no_grad()
def rank_hits(
    heads: MedusaHeads,
    hidden: Tensor,  # (B, T, d): the backbone's last hidden states, in the dtype of the heads
    ids: Tensor,  # (B, T) long: the tokens they were computed on
    counted: Tensor,  # (B, T) bool: whether the token there is to be guessed
    ranks: int,
    segments: Tensor | None = None,  # (B, T) long: the text each token belongs to; heads do not guess across texts
) -> tuple[Tensor, Tensor]:  # (K, ranks) long, (K,) long
    """How often the token k + 1 places on was exactly the i-th guess of head k, and how often head k guessed."""
    num_heads = len(heads)
    hits, asked = torch.zeros(num_heads, ranks, dtype=torch.long), torch.zeros(num_heads, dtype=torch.long)
    for k in range(num_heads):
        shift = k + 2  # head k + 1 at position t guesses token t + k + 2
        if ids.shape[1] <= shift:
            break
        chosen = predicted(counted, segments, shift)
        state, root, wanted = (t[chosen] for t in (hidden[:, :-shift], ids[:, 1 : 1 - shift], ids[:, shift:]))
        for part, first, token in zip(state.split(1024), root.split(1024), wanted.split(1024)):  # logits of a chunk at a time
            hits[k] += (_guesses(heads, part, k, ranks, first) == token[:, None]).sum(0).cpu()
        asked[k] = len(wanted)
    return hits, asked


def _guesses(heads: MedusaHeads, hidden: Tensor, k: int, ranks: int, root: Tensor) -> Tensor:  # (n, d), (n,) -> (n, ranks) long
    """The likeliest tokens of head k + 1, in order."""
    known = heads.embed(root) if heads.kind != "medusa" else None
    lm_head = heads.lm_head(k)  # the backbone's, if shared, in the backbone's dtype
    dtype = next(lm_head.parameters(), hidden).dtype
    return heads.tokens(lm_head(heads.state(hidden, k, known).to(dtype)).topk(ranks, dim=-1).indices)


def accuracies_of(hits: Sequence[Sequence[int]], asked: Sequence[int]) -> list[list[float]]:
    """[k - 1][i]: how often exactly guess i (0-based) of head k was right, as a share of its guesses."""
    return [[hit / max(times, 1) for hit in row] for row, times in zip(hits, asked, strict=True)]


def path_chances(tree: MedusaTree, accuracies: Sequence[Sequence[float]]) -> dict[tuple[int, ...], float]:
    """How often each path of a tree comes true if heads err independently: the product of its guesses' accuracies (see
    `accuracies_of`; paper 2.3.3); 0 where a guess's accuracy is not known."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for path in tree.paths:  # parents first
        row = accuracies[len(path) - 1] if len(path) <= len(accuracies) else ()
        chances[path] = chances[path[:-1]] * (row[path[-1]] if path[-1] < len(row) else 0.0)
    del chances[()]
    return chances


def expected_acceptance_length(tree: MedusaTree, accuracies: Sequence[Sequence[float]]) -> float:
    """Tokens per step that the tree should accept, the root included, for heads that err independently (paper 2.3.3).

    >>> expected_acceptance_length(MedusaTree([(0,), (0, 0)]), [[0.5], [0.4]])
    1.7
    """
    return 1 + sum(path_chances(tree, accuracies).values())
