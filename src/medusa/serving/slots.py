"""Slots: the rows of one preallocated cache, with the text that each holds; rows that decode together stand side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medusa.batch.rows import READING, Row
from medusa.batch.state import Decodable, DecodingState, RequestCache, start, vacant
from medusa.trees.tensors import Drafter, Frame


class Slots:
    """A pool of rows over one cache. A row whose request has ended keeps its text, which later requests may begin with.

    Args:
        number: number of rows.
        capacity: number of tokens that a row holds.
        drafter: a drafter of those that will be used, one that reads the history if any of them does.
    """

    @torch.inference_mode()
    def __init__(self, model: Decodable, number: int, capacity: int, drafter: Drafter):
        self.model, self.number, self.capacity = model, number, capacity
        self.state = vacant(model, number, capacity, drafter)
        self.state.pooled = True
        one = model.new_cache(1)  # of one token: the keys and values that the model makes decide the cache's shape
        hidden, _ = model.prefill(torch.zeros(1, 1, dtype=torch.long, device=model.device), None, one)
        self.state.cache.place(one, torch.zeros(1, dtype=torch.long, device=model.device), number)
        self.state.hidden = hidden.new_zeros(number, hidden.shape[1])
        self._texts: list[list[int]] = [[] for _ in range(number)]  # of free slots: the tokens that are still in the cache
        self._used = [0] * number  # when each was last freed
        self._clock = 0
        self._caches: dict[tuple[int, int], RequestCache] = {}

    def cached(self, slot: int, ids: Sequence[int]) -> int:
        """How many of a prompt's first tokens are in a free slot; the last never counts, since its hidden state drafts."""
        matching = 0
        for token, held in zip(ids[:-1], self._texts[slot], strict=False):
            if token != held:
                break
            matching += 1
        return matching

    def choose(self, free: Sequence[int], ids: Sequence[int]) -> int:
        """The free slot with most of a prompt's beginning; of several, the one free for longest."""
        return max(free, key=lambda slot: (self.cached(slot, ids), -self._used[slot]))

    def take(self, slot: int, row: Row, ids: Tensor, done: int) -> None:
        """Begin a prompt in a free slot that holds its first `done` tokens."""
        row.prompt, row.finish_reason = ids[:done], READING
        self.state.rows[slot] = row
        self._texts[slot] = []
        self.state.lengths[slot] = done

    @torch.inference_mode()
    def read(
        self,
        slot: int,
        ids: Tensor,  # (P,) long: the whole prompt
        done: int,  # number of its tokens that are in the cache
        number: int,  # number of tokens to process
    ) -> Tensor:  # (1, number, d)
        """Process the next chunk of a prompt; returns its hidden states."""
        at = torch.full((1,), done, device=ids.device)
        frame = Frame(at[0], at, torch.zeros_like(at), visible=done + number)
        hidden = self.model.extend(ids[None, done : done + number], frame, self._cache(slot, slot + 1))
        self.state.rows[slot].prompt = ids[: done + number]
        self.state.lengths[slot] = done + number
        return hidden

    def start(self, slot: int, ids: Tensor, hidden: Tensor, logits: Tensor) -> None:
        """Decide the first token of a prompt that has been processed: hidden state (1, d) and logits (1, V) of its last."""
        start(self.state, [slot], [self.state.rows[slot]], ids[None], ids.new_zeros(1), hidden, logits)

    def part(self, first: int, stop: int, drafter: Drafter) -> DecodingState:
        """Some slots as a state that can be stepped."""
        return self.state.part(first, stop, drafter, self._cache(first, stop))

    def stepped(self, first: int, stop: int, base: int) -> None:
        """Forget the text of free slots that a step has written over: it wrote its trees from slot `base` on in all rows."""
        for slot in range(first, stop):
            del self._texts[slot][base:]

    def swap(self, slot: int, other: int) -> None:
        """Let two slots change places, whatever they hold."""
        if slot != other:
            self.state.swap(slot, other, max(self._held(slot), self._held(other)))
            self._texts[slot], self._texts[other] = self._texts[other], self._texts[slot]
            self._used[slot], self._used[other] = self._used[other], self._used[slot]

    def free(self, slot: int, keep: bool = True) -> None:
        """Take the request out of a slot.

        Args:
            keep: whether its keys and values are good for a later prompt.
        """
        row = self.state.rows[slot]
        text = row.prompt.tolist() + row.generated if keep and row.prompt is not None else []
        # Without the last token, which may have ended the row as its root, before it was in the cache.
        self._texts[slot] = text[:-1] if row.generated else text
        self._clock += 1
        self._used[slot] = self._clock
        self.state.rows[slot] = Row()
        self.state.active[slot] = False

    @property
    def committed(self) -> int:
        """The number of tokens in the cache."""
        return sum(map(self._held, range(self.number)))

    def _held(self, slot: int) -> int:
        return len(self._texts[slot]) or self.state.rows[slot].committed

    def _cache(self, first: int, stop: int) -> RequestCache:
        """The cache of some slots, always the same object: graphs are bound to where it is."""
        if (first, stop) not in self._caches:
            self._caches[first, stop] = self.state.cache.rows(first, stop)
        return self._caches[first, stop]
