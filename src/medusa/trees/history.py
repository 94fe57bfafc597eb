"""The context of a request: which short runs of tokens it has said before, as drafters like to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

SLOTS = 16  # of the table for each token there may be: so few collisions that drafts hardly feel them


@dataclass
class History:
    """What every row has said: its tokens, and where it last said each of its pairs and triples of tokens, by their hashes.

    It only ever proposes: a collision costs a node of a draft, never an output.
    """

    table: Tensor  # (B, slots + 1) int32: where the token after a run stands; 0: never said; the last slot is for what is none
    tokens: Tensor  # (B, capacity + 1) long: the padded prompt, then what was decided, the root last
    length: Tensor  # (B,) long: of them
    last: Tensor  # (B,) long: the token before the root
    after: Tensor  # (B,) long: where the token stands that followed when the text last came to the root like this; 0: never

    @classmethod
    def empty(cls, batch: int, capacity: int, device: torch.device | str | None = None) -> History:
        """The context of rows that have said nothing yet.

        Args:
            capacity: tokens that a row may come to hold, padding and root included.
        """
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        table = zeros.new_zeros(batch, (1 << (SLOTS * capacity - 1).bit_length()) + 1, dtype=torch.int32)
        return cls(table, zeros.new_zeros(batch, capacity + 1), torch.ones_like(zeros), zeros, zeros)

    @classmethod
    def of(
        cls,
        prompts: Tensor,  # (B, P) long, left-padded
        pads: Tensor,  # (B,) long
        root: Tensor,  # (B,) long
        capacity: int,  # tokens that a row may come to hold, padding and root included
    ) -> History:
        """The context at the start of a request."""
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
        """Begin some rows anew, with the prompts of new requests."""
        number, width = prompts.shape
        text = pad(
            torch.cat([prompts, root[:, None]], 1), (1, 0)
        )  # one more in front: three even where the prompt is one token
        length, last = torch.full_like(pads, width + 1), prompts[:, -1]
        tokens = pad(text[:, 1:], (0, self.tokens.shape[1] - width - 1))
        part = History(self.table.new_zeros(number, self.table.shape[1]), tokens, length, last, torch.zeros_like(pads))
        at = torch.arange(-1, width + 1, device=prompts.device).expand(number, -1)  # where each token stands
        place = at - pads[:, None]  # and where in its text
        part._remember(text, at + 1, place >= 1, place >= 2, length)
        for name in ("table", "tokens", "length", "last", "after"):
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(part, name)))

    def grow(self, capacity: int) -> None:
        """Make room for more tokens a row; the tables stay as they are, with more collisions, which cost drafts alone."""
        self.tokens = pad(self.tokens, (0, capacity + 1 - self.tokens.shape[1]))

    def extend(
        self,
        path: Tensor,  # (B, D + 1) long: the tokens of the accepted path, the old root first; behind it anything
        length: Tensor,  # (B,) long: of the path
        bonus: Tensor,  # (B,) long: the next root
    ) -> None:
        """Remember an accepted path and the token after it."""
        rows = torch.arange(len(path), device=path.device)
        new = torch.cat([self.last[:, None], path, path[:, :1]], dim=1)
        new[rows, length + 1] = bonus
        number = torch.arange(new.shape[1], device=path.device)
        wanted = (number <= length[:, None] + 1) & (number > 1)  # the old root, with what led to it, is known
        at = self.length[:, None] + number - 2
        trash = self.tokens.shape[1] - 1
        self.tokens.scatter_(1, at.where(wanted & (at < trash), trash), new)
        self.length = (self.length + length).clamp(max=trash)
        self.last = path[rows, length - 1]
        self._remember(new, at + 1, wanted, wanted, length + 1)

    def _remember(self, tokens: Tensor, after: Tensor, pairs: Tensor, triples: Tensor, end: Tensor) -> None:
        """Note where the token after each pair and triple stands, where they are wanted; look up the last run before that."""
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
            # The run at the end is looked up before it is known itself, but after all before it.
            self.table.scatter_reduce_(1, slots.where(inside, trash), places, "amax")
            last = slots.gather(1, (end - first).clamp(min=0)[:, None])
            found.append(self.table.gather(1, last).squeeze(1).where((last != trash).squeeze(1), 0))
            self.table.scatter_reduce_(1, slots, places, "amax")
        # Places are the right ones but for collisions, and the tokens that led to them are at hand. A row that has ended is
        # still extended, beyond its room.
        before = torch.arange(-3, 0, device=end.device)
        places = torch.stack(found, 1).long()  # (B, 2)
        places = places.where(places < self.length[:, None], 0)
        run = self.tokens.gather(1, (self.length[:, None] + before).clamp(min=0))
        led = self.tokens.gather(1, (places[..., None] + before).clamp(min=0).flatten(1)).view(len(run), 2, 3)
        same = led == run[:, None]
        pair, triple = places.where(torch.stack([same[:, 0, 1:].all(-1), same[:, 1].all(-1)], 1), 0).unbind(1)
        self.after = torch.where(triple > 0, triple, pair)

    def said(
        self,
        keys: Tensor,  # (B, ...) long: of pairs or triples
    ) -> Tensor:  # (B, ...) bool
        """Whether the context holds these runs of tokens."""
        return self.table.gather(1, self._slots(keys).flatten(1)).view(keys.shape) > 0

    def continuation(self, number: int) -> Tensor:  # (B, number) long
        """What followed the last time the text came to the root in this way, and behind the root the same again; where it never
        did, anything."""
        period = (self.length - self.after)[:, None]
        at = self.after[:, None] + torch.arange(number, device=period.device) % period
        return self.tokens.gather(1, at)

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
