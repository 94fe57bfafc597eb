"""Guidance: what a grammar says of the coming tokens before a step drafts, and trees drafted by it.

Tokens that the grammar forces stand in the tree as a chain behind the root. Of the next head, only guesses that the grammar
allows become nodes. The backbone verifies all nodes as always: guidance changes the number of steps, never the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa.trees.history import History
from medusa.trees.tensors import Along, Drafter, Guesses, TreeTensors, tree_tensors

LONGEST = 16  # maximum number of forced tokens in a tree; more follow in the next step


class Outlook(NamedTuple):
    """What may follow the root of one row, on the host."""

    forced: Sequence[int]  # the tokens that must follow, up to `longest_chain`
    allowed: Tensor  # (ceil(V / 32),) int32, a bit per token: those that may follow the forced ones


@dataclass(frozen=True)
class GuidedDrafter:
    """A drafter whose trees follow what the grammars of the rows say, for one step.

    Rows whose forced tokens reach deeper than the heads get a chain in place of the tree.
    """

    inner: Drafter
    forced: Tensor  # (B, F) long: the tokens that must follow the root, then anything
    number: Tensor  # (B,) long: how many, up to F
    allowed: Tensor  # (B, W) int32: a bit per token that may follow them; all set in rows without a grammar
    vocabulary: Tensor | None  # (V',) long: the tokens that the heads score; None: all

    @property
    def num_nodes(self) -> int:
        return self.inner.num_nodes

    @property
    def num_heads(self) -> int:
        return self.inner.num_heads

    @property
    def ranks(self) -> int:
        return self.inner.ranks

    @property
    def depth(self) -> int:
        return max(self.inner.depth, self.forced.shape[1])

    @property
    def reads_history(self) -> bool:
        return self.inner.reads_history

    @property
    def fixed(self) -> None:
        return None

    def guess(
        self,
        head_logits: Tensor,  # (D, B, V')
    ) -> Guesses:
        """The likeliest tokens, where the head behind the forced tokens scores only those that the grammar allows."""
        if self.vocabulary is None:
            allowed = unpacked(self.allowed, head_logits.shape[-1])
        else:
            allowed = unpacked(self.allowed, 32 * self.allowed.shape[1])[:, self.vocabulary]
        allowed = allowed | ~allowed.any(-1, keepdim=True)  # a draft vocabulary may hold none of them
        behind = torch.arange(len(head_logits), device=head_logits.device)[:, None] == self.number  # (D, B)
        return self.inner.guess(head_logits.masked_fill(behind[..., None] & ~allowed, -torch.inf))

    def assemble(
        self,
        root: Tensor,  # (B,) long
        guesses: Guesses | None,
        history: History | None = None,
    ) -> tuple[Tensor, TreeTensors]:
        """The token of every node (B, N), and every row's own tree."""
        tokens, tree = self.inner.assemble(root, None if guesses is None else self._with_forced(guesses), history)
        batch, nodes = tokens.shape
        length = self.forced.shape[1]
        chain = torch.cat([root[:, None], self.forced, root[:, None].expand(-1, nodes - 1 - length)], 1)
        node = torch.arange(nodes, device=root.device)
        above = (node - 1).clamp(min=0) * (node <= self.number[:, None])  # the rest hang on the root, and are wasted
        long = (self.number > self.inner.num_heads)[:, None]
        parents = torch.where(long, above, tree.parents.expand(batch, -1))
        return torch.where(long, chain, tokens), tree_tensors(parents, self.depth)

    def _with_forced(self, guesses: Guesses) -> Guesses:
        """The guesses with the forced tokens as the only likely ones at their depths."""
        heads = self.inner.num_heads
        forced = pad(self.forced, (0, max(0, heads - self.forced.shape[1])))[:, :heads].T  # (D, B)
        known = torch.arange(heads, device=forced.device)[:, None] < self.number  # (D, B)
        first = torch.arange(guesses.tokens.shape[-1], device=forced.device) == 0  # (R,)
        tokens = torch.where(known[..., None] & first, forced[..., None], guesses.tokens)
        if guesses.log_p is None:
            return guesses._replace(tokens=tokens)
        sure = guesses.log_p.new_zeros(()).where(first, -torch.inf)  # (R,)
        log_p = torch.where(known[..., None], sure, guesses.log_p)
        along = None if guesses.along is None else _along(guesses.along, known, log_p)
        return guesses._replace(tokens=tokens, log_p=log_p, along=along)


def _along(along: Along, known: Tensor, log_p: Tensor) -> Along:
    """Scores along paths in which forced tokens are certain and forbidden ones impossible, as they are from the root alone."""

    def scored(depth: int, paths: Tensor) -> Tensor:
        alone = log_p[depth, :, None]  # (B, 1, R)
        scores = along(depth, paths).masked_fill(alone == -torch.inf, -torch.inf)
        return torch.where(known[depth, :, None, None], alone, scores)

    return scored


def longest_chain(drafter: Drafter) -> int:
    """The maximum number of forced tokens that its trees can hold; 0: it drafts nothing."""
    return min(LONGEST, drafter.num_nodes - 1) if drafter.num_heads else 0


def guided(
    drafter: Drafter,
    outlooks: Sequence[Outlook | None],  # B; None: a row without a grammar
    vocabulary: Tensor | None,  # (V',) long: the tokens that the heads score; None: all
    device: torch.device,
) -> Drafter:
    """The drafter of a step: the given one, if no row has an outlook."""
    free = next((torch.full_like(outlook.allowed, -1) for outlook in outlooks if outlook is not None), None)
    if free is None:
        return drafter
    found = [Outlook([], free) if outlook is None else outlook for outlook in outlooks]
    length = longest_chain(drafter)
    numbers = torch.tensor([[len(own.forced), *own.forced, *[0] * (length - len(own.forced))] for own in found]).to(device)
    allowed = torch.stack([own.allowed for own in found]).to(device)
    return GuidedDrafter(drafter, numbers[:, 1:], numbers[:, 0], allowed, vocabulary)


def unpacked(
    bits: Tensor,  # (..., W) int32: 32 tokens each
    vocab_size: int,
) -> Tensor:  # (..., V) bool
    """A mask of tokens from its bits; tokens beyond them are not allowed."""
    at = torch.arange(32, device=bits.device, dtype=torch.int32)
    mask = (bits[..., None] >> at & 1).bool().flatten(-2)
    return pad(mask, (0, max(0, vocab_size - mask.shape[-1])))[..., :vocab_size]
