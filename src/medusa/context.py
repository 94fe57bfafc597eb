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
        a, b = tokens[:, :-1], tokens[:, 1:]
        for keys, wanted in (
            (pair_start(a) + pair_end(b), pairs),
            (triple_start(a[:, :-1], b[:, :-1]) + triple_end(b[:, 1:]), triples),
        ):
            self.table.scatter_(1, self._slots(keys).where(wanted, self.table.shape[1] - 1), True)

    def said(
        self,
        keys: Tensor,  # (B, ...) long: of pairs or triples
    ) -> Tensor:  # (B, ...) bool
        """Whether the context holds these runs of tokens."""
        return self.table.gather(1, self._slots(keys).flatten(1)).view(keys.shape)

    def _slots(self, keys: Tensor) -> Tensor:
        """The top bits of a key."""
        bits = (self.table.shape[1] - 1).bit_length() - 1
        return (keys >> (64 - bits)) & ((1 << bits) - 1)


# A run's key is what its beginning and its last token add up to, modulo 2 ** 64; slots are its top bits: multiplicative
# hashing, in parts, so that a drafter computes what each guess adds once for all the runs that it may end.


def pair_start(first: Tensor) -> Tensor:
    return first * 0x2545F4914F6CDD1D


def pair_end(second: Tensor) -> Tensor:
    return second * -0x61C8864680B583EB


def triple_start(first: Tensor, second: Tensor) -> Tensor:
    return first * 0x369DEA0F31A53F85 + second * -0x4B47D0C5A1B0E6A9


def triple_end(third: Tensor) -> Tensor:
    return third * 0x5851F42D4C957F2D + 0x14057B7EF767814F  # no triple has the key of a pair of zeros
