"""The state of rows that decode together, and how requests join them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from medusa.acceptance import TypicalAcceptance
from medusa.config import integer
from medusa.sampling import Levels, Processors, choose, levels_of, uniforms
from medusa.trees.history import History
from medusa.trees.tensors import Drafted, Drafter, Frame

StoppingCriterion = Callable[[Tensor, None], Tensor]
CAPACITY_STEP = 256  # static shapes: capacities are rounded up to this, so that requests share a graph
VACANT = "vacant"  # the finish reason of a row without a request


class RequestCache(Protocol):
    """The KV cache of a request; `TreeCache` is one."""

    capacity: int

    def keep(self, source: Tensor, target: Tensor) -> None: ...

    def place(self, other: Any, rows: Tensor, batch: int) -> None: ...

    def grow(self, capacity: int) -> None: ...


class Decodable(Protocol):
    """What the loop needs from a model; `MedusaModel` provides it."""

    num_heads: int
    max_length: int | None  # maximum number of tokens in a row; None: no limit
    vocab_size: int
    scored: int  # number of tokens that the heads score
    static_shapes: bool  # every step must have the same shapes, as compiled graphs require

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, capacity: int) -> RequestCache: ...

    def prefill(self, ids: Tensor, attention_mask: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]: ...

    def draft_and_verify(
        self, root: Tensor, hidden: Tensor, drafter: Drafter, history: History | None, frame: Frame, cache: Any
    ) -> Drafted: ...


@dataclass(frozen=True)
class DecodingOptions:
    """Options of decoding, the same for all rows.

    Args:
        max_new_tokens: limit of new tokens per row.
        do_sample: draw from the backbone's distribution instead of taking its argmax.
        typical: thresholds of typical acceptance; None: acceptance is exact.
        processors: logits processors, temperature among them.
        eos_token_ids: ids that end a row; the id itself is part of the output.
        stopping_criteria: transformers' criteria, applied after every token as in plain decoding.
        seed: seed of the draws; row b has its own stream, (seed, b).
    """

    max_new_tokens: int
    do_sample: bool = False
    typical: TypicalAcceptance | None = None
    processors: Processors = field(default_factory=Processors)
    eos_token_ids: tuple[int, ...] = ()
    stopping_criteria: Sequence[StoppingCriterion] = ()
    seed: int = 0

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("seed", None)):
            object.__setattr__(self, name, integer(name, getattr(self, name), least))


@dataclass
class DecodingState:
    """B rows that decode together, each at its own length: left-padded prompts and the tokens generated so far.

    A row without a request, or whose request has ended, takes part in every step without effect, until `admit` fills it.
    """

    prompts: list[Tensor]  # per row (P,) long, padding included
    pads: Tensor  # (B,) long
    starts: Tensor  # (B,) long: slots of the prompt, padding included
    lengths: Tensor  # (B,) long: committed slots, padding included
    active: Tensor  # (B,) bool
    root: Tensor  # (B,) long: the next token, decided but not yet in the cache
    hidden: Tensor  # (B, d): hidden state of the last committed token
    drafter: Drafter
    history: History | None  # None: the drafter does not read it
    levels: list[Levels] | None  # of a fixed tree, if processors read paths
    cache: RequestCache
    uniforms: Tensor | None  # (B, max_new_tokens + depth + 2): one number per token position; None: nothing is drawn
    # On the host, from the sync of each step.
    host_pads: list[int]
    host_roots: list[int]
    generated: list[list[int]]
    finish_reasons: list[str | None]

    @property
    def finished(self) -> bool:
        return None not in self.finish_reasons

    @property
    def committed(self) -> list[int]:
        """The number of committed slots of every row, padding included: `lengths` on the host."""
        return [len(prompt) + len(tokens) for prompt, tokens in zip(self.prompts, self.generated, strict=True)]

    @property
    def base(self) -> int:
        """The slot of the next roots, behind the longest unfinished row."""
        return max(length for length, reason in zip(self.committed, self.finish_reasons, strict=True) if reason is None)

    def frame(self, static_shapes: bool) -> Frame:
        """Where the next trees stand in the cache."""
        base = self.base
        visible = self.cache.capacity if static_shapes else base + self.drafter.num_nodes
        slot = torch.full((), base, device=self.root.device)  # filled on the device: no copy from the host
        return Frame(slot, self.lengths, self.pads, visible)

    def grow(self, capacity: int) -> None:
        """Make room for rows of `capacity` slots."""
        if capacity > self.cache.capacity:
            self.cache.grow(capacity)
            if self.history is not None:
                self.history.grow(capacity)

    def place(self, rows: Tensor, **of_rows: Tensor) -> None:
        """Replace tensors of the state in some rows, (n,) long."""
        for name, tensor in of_rows.items():
            setattr(self, name, getattr(self, name).index_copy(0, rows, tensor))

    def prefixes(self) -> list[Tensor | None]:
        """The tokens of every unfinished row, its padding included, for processors that read them."""
        return [
            None if done else torch.cat([prompt, prompt.new_tensor(tokens)])
            for prompt, tokens, done in zip(self.prompts, self.generated, self.finish_reasons, strict=True)
        ]


def room(model: Decodable, prompt_length: int, drafter: Drafter, options: DecodingOptions) -> int:
    """The number of slots that a row may need."""
    # The tree is written behind the longest row, and a path may be moved to the end of any other.
    slots = prompt_length + options.max_new_tokens + drafter.num_nodes + drafter.depth + 1
    return -(-slots // CAPACITY_STEP) * CAPACITY_STEP if model.static_shapes else slots


@torch.inference_mode()
def vacant(model: Decodable, batch: int, capacity: int, drafter: Drafter, options: DecodingOptions) -> DecodingState:
    """Rows without requests, with room for `capacity` slots each."""
    zeros = torch.zeros(batch, dtype=torch.long, device=model.device)
    draws = options.do_sample and options.typical is None
    width = options.max_new_tokens + drafter.depth + 2
    return DecodingState(
        prompts=[zeros[:0]] * batch,
        pads=zeros,
        starts=zeros,
        lengths=zeros,
        active=zeros.bool(),
        root=zeros,
        hidden=zeros[:, None],  # its width and dtype are set with the first prompts
        drafter=drafter,
        history=History.empty(batch, capacity, model.device) if drafter.reads_history else None,
        levels=levels_of(drafter.fixed) if drafter.fixed is not None and options.processors.read_paths else None,
        cache=model.new_cache(capacity),
        uniforms=uniforms([(0, 0)], width, model.device).expand(batch, -1) if draws else None,  # replaced when a request joins
        host_pads=[0] * batch,
        host_roots=[0] * batch,
        generated=[[] for _ in range(batch)],
        finish_reasons=[VACANT] * batch,
    )


@torch.inference_mode()
def admit(
    model: Decodable,
    state: DecodingState,
    rows: Sequence[int],  # n rows without a request, or whose request has ended
    ids: Tensor,  # (n, P) long, left-padded
    attention_mask: Tensor | None,  # (n, P), 1 for tokens
    streams: Sequence[tuple[int, int]],  # n streams of draws, see `uniforms`
    options: DecodingOptions,
) -> None:
    """Process the prompts of new requests and decide the first token of each. Other rows are not affected."""
    number, length = ids.shape
    batch, at = len(state.prompts), torch.tensor(rows, device=ids.device)
    state.grow(room(model, length, state.drafter, options))
    cache = state.cache if number == batch else model.new_cache(length)  # all rows at once need no copy
    hidden, logits = model.prefill(ids, attention_mask, cache)
    if cache is not state.cache:
        state.cache.place(cache, at, batch)
    pads = length - attention_mask.sum(-1) if attention_mask is not None else ids.new_zeros(number)
    host_pads = pads.tolist()
    scores, first = options.processors(logits[:, None], list(ids), host_pads), None
    if state.uniforms is not None:
        numbers = uniforms(streams, state.uniforms.shape[1], ids.device)
        state.place(at, uniforms=numbers)
        first = numbers[:, :1]
    root = choose(scores, first)[:, 0]
    if state.hidden.shape[1] != hidden.shape[1]:
        state.hidden = hidden.new_zeros(batch, hidden.shape[1])
    start = torch.full_like(pads, length)
    state.place(
        at, hidden=hidden, root=root, pads=pads, starts=start, lengths=start, active=torch.ones_like(pads, dtype=torch.bool)
    )
    if state.history is not None:
        state.history.place(at, ids, pads, root)
    for row, prompt, padding, token in zip(rows, ids, host_pads, root.tolist(), strict=True):
        state.prompts[row], state.host_pads[row], state.host_roots[row] = prompt, padding, token
        state.generated[row], state.finish_reasons[row] = [], None
