"""The context of a request: which short runs of tokens it has said before, as drafters like to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SLOTS = 16  # of the table for each token there may be: so few collisions that drafts hardly feel them


@dataclass
class Context:
    """What every row has said: a table of the hashes of its pairs and triples of tokens, and its last committed token.

    The table only ever proposes: a collision costs a node of a draft, never an output.
    """

    table: Tensor  # (B, slots + 1) bool; the last slot is for what is not to be remembered
    last: Tensor  # (B,) long: the token before the root

    @classmethod
    def of(
        cls,
        prompts: Tensor,  # (B, P) long, left-padded
        pads: Tensor,  # (B,) long
        root: Tensor,  # (B,) long
        capacity: int,  # tokens that a row may come to hold
    ) -> Context:
        """The context at the start of a request."""
        slots = 1 << (SLOTS * capacity - 1).bit_length()
        table = torch.zeros(len(prompts), slots + 1, dtype=torch.bool, device=prompts.device)
        context = cls(table, prompts[:, -1].clone(memory_format=torch.contiguous_format))
        tokens = torch.cat([prompts, root[:, None]], dim=1)
        at = torch.arange(tokens.shape[1], device=tokens.device) - pads[:, None]  # the place of a token in its text
        context._remember(tokens, at[:, 1:] >= 1, at[:, 2:] >= 2)
        return context

    def extend(
        self,
        path: Tensor,  # (B, D + 1) long: the tokens of the accepted path, the old root first; behind it anything
        length: Tensor,  # (B,) long: of the path
        bonus: Tensor,  # (B,) long: the next root
    ) -> None:
        """Remember an accepted path and the token after it."""
        rows = torch.arange(len(path), device=path.device)
        tokens = torch.cat([self.last[:, None], path, path[:, :1]], dim=1)
        tokens[rows, length + 1] = bonus
        new = torch.arange(tokens.shape[1], device=path.device) <= length[:, None] + 1
        new[:, 1] = False  # the old root, with what led to it, is known
        self._remember(tokens, new[:, 1:], new[:, 2:])
        self.last = path[rows, length - 1]

    def _remember(self, tokens: Tensor, pairs: Tensor, triples: Tensor) -> None:
        """Set the slots of the pairs and triples that end at each token, where they are wanted."""
        for slots, wanted in (
            (self._slots(tokens[:, :-1], tokens[:, 1:]), pairs),
            (self._slots(tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]), triples),
        ):
            self.table.scatter_(1, slots.where(wanted, self.table.shape[1] - 1), True)

    def said(
        self,
        *tokens: Tensor,  # each (B, ...) long, that broadcast: a pair or a triple
    ) -> Tensor:  # (B, ...) bool
        """Whether the context holds this run of tokens."""
        slots = self._slots(*tokens)
        return self.table.gather(1, slots.flatten(1)).view(slots.shape)

    def _slots(self, *tokens: Tensor) -> Tensor:
        """Multiplicative hashing: the top bits of a product with an odd number, a token at a time."""
        bits = (self.table.shape[1] - 1).bit_length() - 1
        mixed = tokens[0] + len(tokens) * 0x51ED27
        for token in tokens[1:]:
            mixed = mixed * 0x2545F4914F6CDD1D + token  # wraps around
            mixed = mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)
        return (mixed * -0x61C8864680B583EB >> (64 - bits)) & ((1 << bits) - 1)
