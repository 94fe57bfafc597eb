"""The history of a request: which pairs and triples of tokens occurred, and what followed them, for drafters to look up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa.kernels.build import are_loaded

SLOTS = 16  # table slots per token of capacity: few enough collisions that drafts hardly suffer


@dataclass
class History:
    """The tokens of every row, and a hash table of where each pair and triple of tokens last occurred.

    It only proposes drafts: a collision may waste a node, and never changes the output.
    """

    table: Tensor  # (B, slots + 1) int32: index of the token after a run, 0 if it has not occurred; the last slot is ignored
    tokens: Tensor  # (B, capacity + 1) long: the padded prompt, then the tokens decided, the root last
    length: Tensor  # (B,) long: number of these tokens
    last: Tensor  # (B,) long: the token before the root
    after: Tensor  # (B,) long: index of the token that followed the last occurrence of the current suffix; 0 if none

    @classmethod
    def empty(cls, batch: int, capacity: int, device: torch.device | str | None = None) -> History:
        """The history of rows without tokens, which may have `capacity` of them, padding and root included."""
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        table = zeros.new_zeros(batch, (1 << (SLOTS * capacity - 1).bit_length()) + 1, dtype=torch.int32)
        return cls(table, zeros.new_zeros(batch, capacity + 1), torch.ones_like(zeros), zeros, zeros.clone())

    @classmethod
    def of(
        cls,
        prompts: Tensor,  # (B, P) long, left-padded
        pads: Tensor,  # (B,) long
        root: Tensor,  # (B,) long
        capacity: int,  # the most tokens of a row, padding and root included
    ) -> History:
        """The history of rows that hold their prompts and roots."""
        history = cls.empty(len(prompts), capacity, prompts.device)
        history.place(torch.arange(len(prompts), device=prompts.device), prompts, pads, root)
        return history

    def place(
        self,
        rows: Tensor,  # (n,) long
        prompts: Tensor,  # (n, P) long, left-padded
        pads: Tensor,  # (n,) long
        root: Tensor,  # (n,) long
    ) -> None:
        """Restart some rows with the prompts of new requests."""
        number, width = prompts.shape
        # One more in front: three tokens even if the prompt has one.
        text = pad(torch.cat([prompts, root[:, None]], 1), (1, 0))
        length, last = torch.full_like(pads, width + 1), prompts[:, -1]
        tokens = pad(text[:, 1:], (0, self.tokens.shape[1] - width - 1))
        part = History(self.table.new_zeros(number, self.table.shape[1]), tokens, length, last, torch.zeros_like(pads))
        at = torch.arange(-1, width + 1, device=prompts.device).expand(number, -1)  # the index of each token
        place = at - pads[:, None]  # and its index without padding
        part._remember(text, at + 1, place >= 1, place >= 2, length)
        for tensor, values in zip(self.tensors(), part.tensors(), strict=True):
            tensor.index_copy_(0, rows, values)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of its tensors; row b of each is row b's."""
        return self.table, self.tokens, self.length, self.last, self.after

    def part(self, start: int, stop: int) -> History:
        """Rows start .. stop - 1; both share their tensors."""
        return History(*(tensor[start:stop] for tensor in self.tensors()))

    def grow(self, capacity: int) -> None:
        """Make room for more tokens per row. The tables keep their size: more collisions, hence worse drafts."""
        self.tokens = pad(self.tokens, (0, capacity + 1 - self.tokens.shape[1]))

    def extend(
        self,
        path: Tensor,  # (B, D + 1) long: the tokens of the accepted path, the old root first; anything after its end
        length: Tensor,  # (B,) long: length of the path
        bonus: Tensor,  # (B,) long: the next root
    ) -> None:
        """Append an accepted path and the token after it."""
        if are_loaded() and self.table.device.type == "cpu":
            torch.ops.medusa.extend_history(*self.tensors(), path.contiguous(), length.contiguous(), bonus.contiguous())
            return
        rows = torch.arange(len(path), device=path.device)
        new = torch.cat([self.last[:, None], path, path[:, :1]], dim=1)
        new[rows, length + 1] = bonus
        number = torch.arange(new.shape[1], device=path.device)
        wanted = (number <= length[:, None] + 1) & (number > 1)  # the old root is recorded already
        at = self.length[:, None] + number - 2
        trash = self.tokens.shape[1] - 1
        self.tokens.scatter_(1, at.where(wanted & (at < trash), trash), new)
        self.length.add_(length).clamp_(max=trash)
        self.last.copy_(path[rows, length - 1])
        self._remember(new, at + 1, wanted, wanted, length + 1)

    def _remember(self, tokens: Tensor, after: Tensor, pairs: Tensor, triples: Tensor, end: Tensor) -> None:
        """Record the index of the token after each wanted pair and triple, and look up where the final run occurred before."""
        trash = self.table.shape[1] - 1
        a, b = tokens[:, :-1], tokens[:, 1:]
        found = []
        for keys, wanted, first in (
            (pair_start(a) + pair_end(b), pairs[:, 1:], 1),
            (triple_start(a[:, :-1], b[:, :-1]) + triple_end(b[:, 1:]), triples[:, 2:], 2),
        ):
            slots = self._slots(keys).where(wanted, trash)
            inside = torch.arange(slots.shape[1], device=slots.device) < end[:, None] - first
            places = after[:, first:].to(self.table.dtype)
            # Look the final run up before inserting it, and after inserting all earlier ones.
            self.table.scatter_reduce_(1, slots.where(inside, trash), places, "amax")
            last = slots.gather(1, (end - first).clamp(min=0)[:, None])
            found.append(self.table.gather(1, last).squeeze(1).where((last != trash).squeeze(1), 0))
            self.table.scatter_reduce_(1, slots, places, "amax")
        # Collisions are found by comparing the tokens before each place. A row that has ended is still extended, past its
        # capacity.
        before = torch.arange(-3, 0, device=end.device)
        places = torch.stack(found, 1).long()  # (B, 2)
        places = places.where(places < self.length[:, None], 0)
        run = self.tokens.gather(1, (self.length[:, None] + before).clamp(min=0))
        led = self.tokens.gather(1, (places[..., None] + before).clamp(min=0).flatten(1)).view(len(run), 2, 3)
        same = led == run[:, None]
        pair, triple = places.where(torch.stack([same[:, 0, 1:].all(-1), same[:, 1].all(-1)], 1), 0).unbind(1)
        self.after.copy_(torch.where(triple > 0, triple, pair))

    def contains(
        self,
        keys: Tensor,  # (B, ...) long: of pairs or triples
    ) -> Tensor:  # (B, ...) bool
        """Whether these runs of tokens have occurred (or one with the same hash has)."""
        return self.table.gather(1, self._slots(keys).flatten(1)).view(keys.shape) > 0

    def continuation(self, number: int) -> Tensor:  # (B, number) long
        """The tokens after the last occurrence of the current suffix, repeated past the root; arbitrary if there was none."""
        period = (self.length - self.after)[:, None]
        at = self.after[:, None] + torch.arange(number, device=period.device) % period
        return self.tokens.gather(1, at)

    def _slots(self, keys: Tensor) -> Tensor:
        """The table slots of keys: their top bits."""
        bits = (self.table.shape[1] - 1).bit_length() - 1
        return (keys >> (64 - bits)) & ((1 << bits) - 1)


# Multiplicative hashing: a run's key is a sum over its beginning and its last token, modulo 2 ** 64. In two parts, so that a
# drafter computes the part of each guess once for all the runs that it may end.


def pair_start(first: Tensor) -> Tensor:
    return first * 0x2545F4914F6CDD1D


def pair_end(second: Tensor) -> Tensor:
    return second * -0x61C8864680B583EB


def triple_start(first: Tensor, second: Tensor) -> Tensor:
    return first * 0x369DEA0F31A53F85 + second * -0x4B47D0C5A1B0E6A9


def triple_end(third: Tensor) -> Tensor:
    return third * 0x5851F42D4C957F2D + 0x14057B7EF767814F  # no triple has the key of a pair of zeros
