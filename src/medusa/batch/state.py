"""The state of rows that decode together, and how requests join them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from medusa.batch.rows import READING, Row, RowSettings, temperature
from medusa.sampling import Levels, RowText, levels_of, position_keys, row_keys
from medusa.trees.guidance import Outlook, guided, longest_chain
from medusa.trees.history import History
from medusa.trees.tensors import Drafted, Drafter, Draws, Frame

CAPACITY_STEP = 256  # static shapes: capacities are rounded up to this, so that requests share a graph


class RequestCache(Protocol):
    """The KV cache of some rows; `TreeCache` is one."""

    capacity: int

    @property
    def bytes(self) -> int: ...

    def keep(self, source: Tensor, target: Tensor) -> None: ...

    def place(self, other: Any, rows: Tensor, batch: int) -> None: ...

    def grow(self, capacity: int) -> None: ...

    def rows(self, start: int, stop: int) -> Self: ...

    def swap(self, row: int, other: int, slots: int) -> None: ...


class Decodable(Protocol):
    """What the loop needs from a model; `MedusaModel` provides it."""

    num_heads: int
    max_length: int | None  # maximum number of tokens in a row; None: no limit
    vocab_size: int
    scored: int  # number of tokens that the heads score
    draft_vocabulary: Tensor | None  # (V',) long: the tokens that the heads score; None: all
    static_shapes: bool  # every step must have the same shapes, as compiled graphs require

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, capacity: int, rows: int | None = None) -> RequestCache: ...  # rows: if a request begins with it

    def prefill(self, ids: Tensor, attention_mask: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]: ...

    def extend(self, ids: Tensor, frame: Frame, cache: Any) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def draft_and_verify(
        self, root: Tensor, hidden: Tensor, drafter: Drafter, history: History | None, frame: Frame, cache: Any
    ) -> Drafted: ...


@dataclass
class DecodingState:
    """B rows that decode together, each at its own length: left-padded prompts and the tokens generated so far."""

    rows: list[Row]
    pads: Tensor  # (B,) long
    starts: Tensor  # (B,) long: slots of the prompt, padding included
    lengths: Tensor  # (B,) long: committed slots, padding included
    active: Tensor  # (B,) bool
    root: Tensor  # (B,) long: the next token, decided but not yet in the cache
    hidden: Tensor  # (B, d): hidden state of the last committed token
    keys: Tensor  # (B,) long: of the rows' draws
    temperatures: Tensor  # (B,) float32: of the rows' draws; 0: nothing is drawn
    slot: Tensor  # () long: where the trees of the last step began in the cache, behind the longest row
    drafter: Drafter
    history: History | None  # None: the drafter does not read it
    cache: RequestCache
    pooled: bool = False  # with static shapes, attention sees no more than `visible_slots`, rather than the whole capacity
    _settings: RowSettings | None = None
    _levels: list[Levels] | None = None
    recorded: Any = None  # on a GPU, what `medusa.decoding.step` has recorded of what follows the pass

    @property
    def finish_reasons(self) -> list[str | None]:
        return [row.finish_reason for row in self.rows]

    @property
    def finished(self) -> bool:
        return None not in self.finish_reasons

    @property
    def settings(self) -> RowSettings:
        """The settings of the rows as they are now."""
        if self._settings is None:
            self._settings = RowSettings(self.rows, self.root.device)
        return self._settings

    @property
    def levels(self) -> list[Levels] | None:
        """The levels of the tree, if it is the same at every step."""
        if self._levels is None and self.drafter.fixed is not None:
            self._levels = levels_of(self.drafter.fixed)
        return self._levels

    @property
    def base(self) -> int:
        """The slot of the next roots, behind the longest row that is decoded or whose prompt is being processed."""
        return max(row.committed for row in self.rows if row.finish_reason in (None, READING))

    def frame(self, static_shapes: bool) -> Frame:
        """Where the next trees stand in the cache."""
        base = self.base
        visible = base + self.drafter.num_nodes
        if static_shapes:
            visible = visible_slots(visible, self.cache.capacity) if self.pooled else self.cache.capacity
        draws = self.draws if static_shapes or self.settings.draws else None
        return Frame(self.slot.fill_(base), self.lengths, self.pads, visible, draws)

    @property
    def draws(self) -> Draws:
        """What decides the draws of the rows."""
        return Draws(self.keys, self.starts, self.temperatures)

    def grow(self, capacity: int) -> None:
        """Make room for rows of `capacity` slots."""
        if capacity > self.cache.capacity:
            self.cache.grow(capacity)
            if self.history is not None:
                self.history.grow(capacity)

    def part(self, start: int, stop: int, drafter: Drafter, cache: RequestCache) -> DecodingState:
        """Rows start .. stop - 1 as a state of their own that shares their tensors: what is done to it is done to this one.

        Args:
            cache: the cache of these rows.
        """
        tensors = ("pads", "starts", "lengths", "active", "root", "hidden", "keys", "temperatures")
        of_rows = {name: getattr(self, name)[start:stop] for name in tensors}
        history = self.history.part(start, stop) if self.history is not None else None
        shared = replace(self, rows=self.rows[start:stop], history=history, _settings=None, _levels=None, **of_rows)
        return replace(shared, drafter=drafter, cache=cache, slot=self.slot.clone(), recorded=None)

    def swap(self, row: int, other: int, slots: int) -> None:
        """Let two rows change places, with the first `slots` slots of their cache."""
        at, to = (torch.tensor(pair, device=self.root.device) for pair in ((row, other), (other, row)))
        held = [self.pads, self.starts, self.lengths, self.active, self.root, self.hidden, self.keys, self.temperatures]
        for tensor in (*held, *(self.history.tensors() if self.history is not None else ())):
            tensor.index_copy_(0, at, tensor[to])
        self.rows[row], self.rows[other] = self.rows[other], self.rows[row]
        self.cache.swap(row, other, slots)
        self._settings = None

    def texts(self) -> dict[int, RowText]:
        """The text of every unfinished row whose processors read it."""
        readers = self.settings.processors.readers
        return {number: self.rows[number].text() for number in readers if self.rows[number].finish_reason is None}

    def guided_drafter(self, texts: Mapping[int, RowText], vocabulary: Tensor | None) -> Drafter:
        """The drafter of this step, which follows the grammars of the rows."""
        outlooks: dict[int, Outlook] = {}
        for number, guide in self.settings.processors.guides.items() if longest_chain(self.drafter) else ():
            if number in texts:
                try:
                    outlooks[number] = guide.outlook(texts[number], self.rows[number].root, longest_chain(self.drafter))
                except Exception as error:  # a row's failure is its own
                    self.fail({number: error})
        if not outlooks:
            return self.drafter
        return guided(self.drafter, [outlooks.get(number) for number in range(len(self.rows))], vocabulary, self.root.device)

    def fail(self, errors: Mapping[int, Exception]) -> None:
        """End rows whose processors failed."""
        for number, error in errors.items():
            if self.rows[number].finish_reason is None:
                self.end(number, "error")
                self.rows[number].error = error

    def end(self, number: int, reason: str) -> None:
        """End the request of a row."""
        self.rows[number].finish_reason = reason
        self.active[number] = False


def room(model: Decodable, prompt_length: int, drafter: Drafter, limit: int) -> int:
    """The number of slots that a row of `limit` new tokens may need."""
    slots = prompt_length + limit + overhang(drafter)
    return -(-slots // CAPACITY_STEP) * CAPACITY_STEP if model.static_shapes else slots


def visible_slots(needed: int, capacity: int) -> int:
    """The number of slots that a graph sees if it needs `needed`: a power of two, so that few graphs suffice."""
    return min(capacity, max(CAPACITY_STEP, 1 << (needed - 1).bit_length()))


def overhang(drafter: Drafter) -> int:
    """The number of slots behind its last token that a row needs: for its tree, and for paths that are moved there."""
    # The tree is written behind the longest row, and a path may be moved to the end of any other.
    return drafter.num_nodes + drafter.depth + 1


@torch.inference_mode()
def vacant(model: Decodable, batch: int, capacity: int, drafter: Drafter) -> DecodingState:
    """Rows without requests, with room for `capacity` slots each."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=model.device)

    return DecodingState(
        rows=[Row() for _ in range(batch)],
        pads=zeros(batch),
        starts=zeros(batch),
        lengths=zeros(batch),
        active=zeros(batch).bool(),
        root=zeros(batch),
        slot=zeros(),
        keys=zeros(batch),
        temperatures=zeros(batch).float(),
        hidden=zeros(batch, 1),  # its width and dtype are set with the first prompts
        drafter=drafter,
        history=History.empty(batch, capacity, model.device) if drafter.reads_history else None,
        cache=model.new_cache(capacity, batch),
    )


@torch.inference_mode()
def admit(
    model: Decodable,
    state: DecodingState,
    at: Sequence[int],  # n numbers of rows without a request, or whose request has ended
    rows: Sequence[Row],  # n: the new requests
    ids: Tensor,  # (n, P) long, left-padded
    attention_mask: Tensor | None,  # (n, P), 1 for tokens
) -> None:
    """Process the prompts of new requests and decide the first token of each. Other rows are not affected."""
    number, length = ids.shape
    state.grow(max(room(model, length, state.drafter, row.options.max_new_tokens) for row in rows))
    cache = state.cache if number == len(state.rows) else model.new_cache(length)  # all rows at once need no copy
    hidden, logits = model.prefill(ids, attention_mask, cache)
    if cache is not state.cache:
        state.cache.place(cache, torch.tensor(at, device=ids.device), len(state.rows))
    pads = length - attention_mask.sum(-1) if attention_mask is not None else ids.new_zeros(number)
    start(state, at, rows, ids, pads, hidden, logits)


@torch.inference_mode()
def start(
    state: DecodingState,
    at: Sequence[int],  # n
    rows: Sequence[Row],  # n
    ids: Tensor,  # (n, P) long, left-padded: prompts whose keys and values are in the cache
    pads: Tensor,  # (n,) long
    hidden: Tensor,  # (n, d): of the last token
    logits: Tensor,  # (n, V): after the last token
) -> None:
    """Decide the first token of requests whose prompts have been processed; from now on their rows are decoded."""
    batch, device, places = len(state.rows), ids.device, torch.tensor(at, device=ids.device)
    for row, prompt, padding in zip(rows, ids, pads.tolist(), strict=True):
        row.prompt, row.pads, row.generated, row.memory, row.finish_reason = prompt, padding, [], {}, None
    settings = RowSettings(rows, device)
    readers = {number: rows[number].text() for number in settings.processors.readers}
    scores, errors = settings.processors(logits[:, None], readers)
    keys = row_keys([row.stream for row in rows], device)
    root = settings.choose(scores, position_keys(keys, torch.zeros_like(keys))[:, None])[:, 0]
    if state.hidden.shape[1] != hidden.shape[1]:
        state.hidden = hidden.new_zeros(batch, hidden.shape[1])
    length = torch.full_like(pads, ids.shape[1])
    temperatures = torch.tensor([temperature(row.options) for row in rows], dtype=torch.float32, device=device)
    filled = dict(pads=pads, starts=length, lengths=length, root=root, hidden=hidden, active=torch.ones_like(pads).bool())
    for name, values in (filled | dict(keys=keys, temperatures=temperatures)).items():
        getattr(state, name).index_copy_(0, places, values)
    if state.history is not None:
        state.history.place(places, ids, pads, root)
    for number, row, token in zip(at, rows, root.tolist(), strict=True):
        row.root, state.rows[number] = token, row
    state._settings = None
    state.fail({at[number]: error for number, error in errors.items()})
