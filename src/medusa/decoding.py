"""The loop: draft with the heads, verify the tree in one pass, accept a path, keep its cache rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from medusa.acceptance import Accepted, TypicalAcceptance, accept_exact, accept_typical
from medusa.config import integer
from medusa.errors import ContextOverflow, InvalidInput
from medusa.sampling import Levels, NodePrefixes, Processors, choose, levels_of, uniforms
from medusa.trees.files import Tree
from medusa.trees.history import Context
from medusa.trees.static import StaticDrafter
from medusa.trees.tensors import Drafted, Drafter, Frame

StoppingCriterion = Callable[[Tensor, None], Tensor]
CAPACITY_STEP = 256  # static shapes: a cache is rounded up to this, so that requests share a graph
VACANT = "vacant"  # the finish reason of a row that has no request


class RequestCache(Protocol):
    """The KV cache of a request; `TreeCache` is one."""

    capacity: int

    def keep(self, source: Tensor, target: Tensor) -> None: ...

    def place(self, other: Any, rows: Tensor, batch: int) -> None: ...

    def grow(self, capacity: int) -> None: ...


class Decodable(Protocol):
    """What the loop needs of a model; `MedusaModel` is one."""

    num_heads: int
    context: int | None
    vocab_size: int
    scored: int  # tokens that heads score
    static_shapes: bool  # every step of a request, and requests of similar length, must have the same shapes

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, capacity: int) -> RequestCache: ...

    def prefill(self, ids: Tensor, attention_mask: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]: ...

    def draft_and_verify(
        self, root: Tensor, hidden: Tensor, drafter: Drafter, history: Context | None, frame: Frame, cache: Any
    ) -> Drafted: ...


@dataclass(frozen=True)
class DecodingOptions:
    """How a request is decoded.

    Args:
        max_new_tokens: the most tokens a row gets.
        do_sample: draw from the backbone's distribution instead of taking its argmax.
        typical: thresholds of typical acceptance; None is exact.
        processors: logits processors, temperature among them.
        eos_token_ids: ids that end a row; the id itself is kept.
        stopping_criteria: transformers' criteria, asked after every token as in plain decoding.
        seed: of the draws; row b draws from its own stream (seed, b).
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


@dataclass(frozen=True)
class DecodingStep:
    """What one step emitted.

    `tokens[b]` are row b's new tokens, the root first (none where the row was finished before), `finish_reasons[b]` is
    None while the row goes on, then "eos", "stop" or "length". Of the seconds, those of the first step that the prompts took
    are `prefill_seconds`.
    """

    tokens: list[list[int]]
    finish_reasons: list[str | None]
    seconds: float
    prefill_seconds: float = 0.0


@dataclass
class DecodingState:
    """B rows that decode together, each at its own length: left-padded prompts and what they have got so far.

    A row without a request, or whose request has ended, takes part in every step and gets nothing; `admit` gives it the next.
    """

    prompts: list[Tensor]  # per row (P,) long, padding included
    pads: Tensor  # (B,) long
    starts: Tensor  # (B,) long: slots of the prompt, padding included
    lengths: Tensor  # (B,) long: committed slots, padding included
    active: Tensor  # (B,) bool
    root: Tensor  # (B,) long: decided, not in the cache
    hidden: Tensor  # (B, d): at the last committed token
    drafter: Drafter
    history: Context | None  # where the drafter looks at it
    levels: list[Levels] | None  # of the tree, where it is always the same and processors look at paths
    cache: RequestCache
    uniforms: Tensor | None  # (B, max_new_tokens + depth + 2): one number per token position; None: no draws
    # The same facts on the host, where a sync has brought them anyway.
    host_pads: list[int]
    host_roots: list[int]
    generated: list[list[int]]
    finish_reasons: list[str | None]

    @property
    def finished(self) -> bool:
        return None not in self.finish_reasons

    @property
    def committed(self) -> list[int]:
        """Committed slots of every row, padding included: `lengths` on the host."""
        return [len(prompt) + len(tokens) for prompt, tokens in zip(self.prompts, self.generated, strict=True)]

    @property
    def base(self) -> int:
        """The slot of the next root, behind the longest unfinished row."""
        return max(length for length, reason in zip(self.committed, self.finish_reasons, strict=True) if reason is None)

    def frame(self, static_shapes: bool) -> Frame:
        """Where the next trees stand in the cache."""
        base = torch.full((), self.base, device=self.root.device)  # filled on the device: no copy from the host
        visible = self.cache.capacity if static_shapes else self.base + self.drafter.num_nodes
        return Frame(base, self.lengths, self.pads, visible)

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
        """The tokens of every unfinished row, its padding included, for processors that look at them."""
        return [
            None if done else torch.cat([prompt, prompt.new_tensor(tokens)])
            for prompt, tokens, done in zip(self.prompts, self.generated, self.finish_reasons, strict=True)
        ]


def decode(
    model: Decodable,
    ids: Tensor,  # (B, P) long, left-padded
    attention_mask: Tensor | None,  # (B, P), 1 for tokens
    tree: Tree,
    options: DecodingOptions,
) -> Iterator[DecodingStep]:
    """Decode to the end, a step at a time. The root-only tree is plain decoding: the same loop, without heads.

    Raises:
        InvalidInput: an empty or right-padded prompt, or ids outside the vocabulary.
        ContextOverflow: the prompt and max_new_tokens do not fit the backbone's context.
        InvalidTree: the tree is deeper than the heads or uses ranks beyond the vocabulary.
    """
    ids, attention_mask = check_request(model, ids, attention_mask, tree, options)  # now, not at the first step
    return _steps(model, ids, attention_mask, tree, options)


def _steps(
    model: Decodable, ids: Tensor, attention_mask: Tensor | None, tree: Tree, options: DecodingOptions
) -> Iterator[DecodingStep]:
    start = time.perf_counter()
    state = prefill(model, ids, attention_mask, tree, options)
    prefill_seconds = time.perf_counter() - start
    while not state.finished:
        emitted = step(model, state, options)
        now = time.perf_counter()
        yield DecodingStep(emitted, list(state.finish_reasons), now - start, prefill_seconds)
        start, prefill_seconds = time.perf_counter(), 0.0


def prefill(
    model: Decodable, ids: Tensor, attention_mask: Tensor | None, tree: Tree, options: DecodingOptions
) -> DecodingState:
    """Process the prompts and decide every row's first token, the first root."""
    drafter = tree.for_batch(len(ids)).drafter(ids.device)
    state = vacant(model, len(ids), room(model, ids.shape[1], drafter, options), drafter, options)
    admit(model, state, list(range(len(ids))), ids, attention_mask, [(options.seed, row) for row in range(len(ids))], options)
    return state


def room(model: Decodable, prompt_length: int, drafter: Drafter, options: DecodingOptions) -> int:
    """The most slots that a row can take."""
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
        hidden=zeros[:, None],  # of a width that the first prompts say
        drafter=drafter,
        history=Context.empty(batch, capacity, model.device) if drafter.reads_context else None,
        levels=levels_of(drafter.tree) if isinstance(drafter, StaticDrafter) and options.processors.read_paths else None,
        cache=model.new_cache(capacity),
        uniforms=uniforms([(0, 0)], width, model.device).expand(batch, -1) if draws else None,  # each row's own when it joins
        host_pads=[0] * batch,
        host_roots=[0] * batch,
        generated=[[] for _ in range(batch)],
        finish_reasons=[VACANT] * batch,
    )


@torch.inference_mode()
def admit(
    model: Decodable,
    state: DecodingState,
    rows: Sequence[int],  # n rows that have no request or whose request has ended
    ids: Tensor,  # (n, P) long, left-padded
    attention_mask: Tensor | None,  # (n, P), 1 for tokens
    streams: Sequence[tuple[int, int]],  # of the draws of each, see `uniforms`
    options: DecodingOptions,
) -> None:
    """Process the prompts of requests that join, and decide the first token of each; the other rows stay as they are."""
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


@torch.inference_mode()
def step(model: Decodable, state: DecodingState, options: DecodingOptions) -> list[list[int]]:
    """One draft, one verification, one acceptance; returns every row's new tokens."""
    if (roots := last_roots(state, options)) is not None:
        return emit(state, options, roots)
    frame = state.frame(model.static_shapes)
    drafted = model.draft_and_verify(state.root, state.hidden, state.drafter, state.history, frame, state.cache)
    with record_function("medusa.accept"):
        accepted = accept(state, options, drafted)
    with record_function("medusa.keep"):
        paths = keep(state, drafted, accepted)
    return emit(state, options, paths)


def accept(state: DecodingState, options: DecodingOptions, drafted: Drafted) -> Accepted:
    """The longest path of every row's tree that the backbone would have said."""
    tokens, tree = drafted.tokens, drafted.tree
    prefixes, nodes = [], None
    if options.processors.read_paths:
        prefixes, nodes = state.prefixes(), NodePrefixes(tokens, state.levels or levels_of(tree))
    scores = options.processors(drafted.logits, prefixes, state.host_pads, nodes)
    if options.do_sample and options.typical is not None:
        return accept_typical(tree, tokens, scores.float(), options.typical)
    uniform = None
    if state.uniforms is not None:
        # The token after a node at depth d of a row that has emitted e tokens is the row's token number e + d + 1.
        number = (state.lengths - state.starts)[:, None] + tree.depths + 1
        uniform = state.uniforms.gather(1, number.clamp(max=state.uniforms.shape[1] - 1))
    return accept_exact(tree, tokens, choose(scores, uniform))


def keep(state: DecodingState, drafted: Drafted, accepted: Accepted) -> list[list[int]]:
    """Move the accepted paths' keys and values behind the committed ones; returns every path's tokens."""
    tokens = drafted.tokens.gather(1, accepted.path.clamp(min=0))
    rows = torch.arange(len(tokens), device=tokens.device)
    state.hidden, state.root = drafted.hidden[rows, accepted.node], accepted.bonus
    if state.history is not None:
        state.history.extend(tokens, accepted.length, accepted.bonus)
    # The one host-device sync of the step.
    packet = torch.cat([tokens, torch.stack([accepted.node, accepted.length, accepted.bonus], 1)], 1).tolist()
    base = state.base
    moved = any(
        committed != base or node != length - 1  # nodes 0, 1, 2, ... at the end of the row are in place
        for (*_, node, length, _), committed, done in zip(packet, state.committed, state.finish_reasons, strict=True)
        if not done
    )
    if moved:
        behind = state.lengths[:, None] + torch.arange(accepted.path.shape[1], device=tokens.device)
        state.cache.keep(base + accepted.path.clamp(min=0), behind)
    state.lengths = torch.where(state.active, state.lengths + accepted.length, state.lengths)
    state.host_roots = [row[-1] for row in packet]
    return [row[: row[-2]] for row in packet]


def last_roots(state: DecodingState, options: DecodingOptions) -> list[list[int]] | None:
    """The roots as paths, where each ends its row and there is nothing left to verify; else None."""
    for root, tokens, done in zip(state.host_roots, state.generated, state.finish_reasons, strict=True):
        if not done and root not in options.eos_token_ids and len(tokens) + 1 < options.max_new_tokens:
            return None
    return [[root] for root in state.host_roots]


def emit(state: DecodingState, options: DecodingOptions, paths: list[list[int]]) -> list[list[int]]:
    """Append each row's accepted tokens up to the one that ends it, just where plain decoding would end."""
    emitted: list[list[int]] = []
    for row, path in enumerate(paths):
        emitted.append([])
        if state.finish_reasons[row]:
            continue
        for token in path:
            state.generated[row].append(token)
            emitted[row].append(token)
            if reason := _finish_reason(state, options, row, token):
                state.finish_reasons[row] = reason
                state.active[row] = False
                break
    return emitted


def _finish_reason(state: DecodingState, options: DecodingOptions, row: int, token: int) -> str | None:
    if token in options.eos_token_ids:
        return "eos"
    if options.stopping_criteria:
        prompt = state.prompts[row]
        so_far = torch.cat([prompt, prompt.new_tensor(state.generated[row])])[None]
        if any(bool(torch.as_tensor(criterion(so_far, None)).all()) for criterion in options.stopping_criteria):
            return "stop"
    return "length" if len(state.generated[row]) >= options.max_new_tokens else None


def check_request(
    model: Decodable, ids: Tensor, attention_mask: Tensor | None, tree: Tree, options: DecodingOptions
) -> tuple[Tensor, Tensor | None]:
    """Refuse what cannot be decoded before any work is done; returns ids and mask on the model's device."""
    ids, attention_mask = check_prompts(model, ids, attention_mask)
    tree.check(model.num_heads, model.scored)
    longest = ids.shape[1] if attention_mask is None else int(attention_mask.sum(-1).max())
    check_length(longest, options.max_new_tokens, model.context)
    return ids, attention_mask


def check_length(prompt_tokens: int, max_new_tokens: int, context: int | None, option: str = "max_new_tokens") -> None:
    """Refuse a prompt whose continuation does not fit the context.

    Args:
        option: what the user knows max_new_tokens by.

    Raises:
        ContextOverflow: it does not.
    """
    if context is not None and prompt_tokens + max_new_tokens > context:
        left = context - prompt_tokens
        raise ContextOverflow(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed the context of {context}; "
            + (f"lower {option} to {left} or shorten the prompt" if left > 0 else "shorten the prompt")
        )


def check_prompts(model: Decodable, ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Refuse prompts that are none; returns ids and mask on the model's device, no mask where nothing is padded."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.long, torch.int32):
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidInput(f"input_ids is {got}, wanted a tensor of integers (batch, length)")
    ids = ids.long()
    batch, length = ids.shape
    if batch == 0 or length == 0:
        raise InvalidInput("the prompt is empty; give at least one token, such as the bos token")
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise InvalidInput(f"input_ids go from {ids.min()} to {ids.max()}, the vocabulary has {model.vocab_size} tokens")
    if attention_mask is not None:
        shape = getattr(attention_mask, "shape", type(attention_mask).__name__)
        if shape != ids.shape:
            raise InvalidInput(f"attention_mask has shape {shape}, input_ids {ids.shape}; they must agree")
        attention_mask = attention_mask.to(model.device, torch.long)
        if not (attention_mask.diff(dim=1) >= 0).all() or attention_mask.min() < 0 or attention_mask.max() > 1:
            raise InvalidInput("attention_mask is not left-padded; set tokenizer.padding_side = 'left'")
        if not attention_mask[:, -1].all():
            raise InvalidInput("a row of attention_mask is all padding: its prompt is empty")
        if attention_mask.all():
            attention_mask = None
    return ids.to(model.device), attention_mask
