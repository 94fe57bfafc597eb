"""The loop: draft with the heads, verify the tree in one pass, accept a path, keep its cache rows."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medusa.acceptance import Accepted, accept_drawn, accept_exact, accept_typical
from medusa.batch.rows import DecodingOptions, Row
from medusa.batch.state import Decodable, DecodingState, admit, room, vacant
from medusa.errors import ContextOverflow, InvalidInput
from medusa.kernels.build import are_loaded
from medusa.kernels.cuda_graphs import CudaGraph
from medusa.kernels.workers import release_workers
from medusa.runs.spans import span
from medusa.sampling import NodePrefixes, RowText, keys_after
from medusa.trees.files import Tree
from medusa.trees.tensors import Drafted, TreeTensors


@dataclass(frozen=True)
class DecodingStep:
    """The tokens that one step emitted.

    Args:
        tokens: new tokens of every row, the root first; none if the row had finished before.
        finish_reasons: None until a row ends, then "eos", "stop" or "length".
        seconds: duration of the step; for the first step, with the prefill.
        prefill_seconds: the part of `seconds` spent on the prompts; 0 after the first step.
    """

    tokens: list[list[int]]
    finish_reasons: list[str | None]
    seconds: float
    prefill_seconds: float = 0.0


def decode(
    model: Decodable,
    ids: Tensor,  # (B, P) long, left-padded
    attention_mask: Tensor | None,  # (B, P), 1 for tokens
    tree: Tree,
    options: DecodingOptions,
) -> Iterator[DecodingStep]:
    """Decode to the end, one step at a time. The root-only tree is plain decoding: the same loop, without heads.

    Raises:
        InvalidInput: an empty or right-padded prompt, or ids outside the vocabulary.
        ContextOverflow: the prompt and max_new_tokens do not fit the backbone's context.
        InvalidTree: the tree is deeper than the heads or uses ranks beyond the vocabulary.
    """
    ids, attention_mask = check_request(model, ids, attention_mask, tree, options)  # raises now, not at the first step
    return _steps(model, ids, attention_mask, tree, options)


def _steps(
    model: Decodable, ids: Tensor, attention_mask: Tensor | None, tree: Tree, options: DecodingOptions
) -> Iterator[DecodingStep]:
    start = time.perf_counter()
    try:
        state = prefill(model, ids, attention_mask, tree, options)
        prefill_seconds = time.perf_counter() - start
        raise_errors(state)
        while not state.finished:
            emitted = step(model, state).tokens
            raise_errors(state)
            now = time.perf_counter()
            yield DecodingStep(emitted, state.finish_reasons, now - start, prefill_seconds)
            start, prefill_seconds = time.perf_counter(), 0.0
    finally:
        release_workers()


def prefill(
    model: Decodable, ids: Tensor, attention_mask: Tensor | None, tree: Tree, options: DecodingOptions
) -> DecodingState:
    """Process the prompts and decide every row's first token, the first root."""
    drafter = tree.for_batch(len(ids)).drafter(ids.device)
    state = vacant(model, len(ids), room(model, ids.shape[1], drafter, options.max_new_tokens), drafter)
    rows = [Row(options, stream=(options.seed, number)) for number in range(len(ids))]
    admit(model, state, range(len(ids)), rows, ids, attention_mask)
    return state


def raise_errors(state: DecodingState) -> None:
    """Raise what a processor or criterion of a row raised."""
    for row in state.rows:
        if row.error is not None:
            raise row.error


class Stepped(NamedTuple):
    """What a step did: the new tokens of every row, and the trees with their accepted paths, if there was a pass."""

    tokens: list[list[int]]
    drafted: Drafted | None = None
    accepted: Accepted | None = None


@torch.inference_mode()
def step(model: Decodable, state: DecodingState) -> Stepped:
    """Draft, verify, accept, keep."""
    if (roots := last_roots(state)) is not None:
        return Stepped(emit(state, roots))
    frame = state.frame(model.static_shapes)
    texts = state.texts()
    drafter = state.guided_drafter(texts, model.draft_vocabulary)
    drafted = model.draft_and_verify(state.root, state.hidden, drafter, state.history, frame, state.cache)
    recorded = _recorded(state, drafted) if model.static_shapes and drafted.tokens.is_cuda and not texts else None
    accepted, packet = recorded() if recorded is not None else settle(state, drafted, texts)
    paths = []
    for row, found in zip(state.rows, packet.tolist(), strict=True):  # the one host-device sync of the step
        row.root = found[-1]
        paths.append(found[: found[-2]])
    return Stepped(emit(state, paths), drafted, accepted)


def settle(
    state: DecodingState, drafted: Drafted, texts: Mapping[int, RowText], recording: bool = False
) -> tuple[Accepted, Tensor]:
    """Accept and keep; nothing in it waits for a GPU while a CUDA graph is recorded."""
    with span("medusa.accept"):
        accepted = accept(state, drafted, texts)
    with span("medusa.keep"):
        return accepted, keep(state, drafted, accepted, always=recording)


def _recorded(state: DecodingState, drafted: Drafted) -> CudaGraph | None:
    """`settle` as a CUDA graph, from the second step on that drafts by the same graph for rows of the same settings."""
    of, graph = state.recorded or (None, None)
    if of is None or any(old is not new for old, new in zip(of, (drafted, state.settings), strict=True)):
        state.recorded = (drafted, state.settings), None
    elif graph is None:
        graph = CudaGraph(functools.partial(settle, state, drafted, {}, recording=True))
        state.recorded = of, graph
    return graph


def accept(state: DecodingState, drafted: Drafted, texts: Mapping[int, RowText]) -> Accepted:
    """The longest path of every row's tree that agrees with the backbone."""
    tokens, tree, settings = drafted.tokens, drafted.tree, state.settings
    if settings.plain and _in_kernels(drafted.logits):
        return Accepted(*torch.ops.medusa.accept(drafted.logits, tokens, *tree[:3], *state.draws, state.lengths))
    levels = None if settings.processors.guides else state.levels  # a grammar may have changed the tree
    nodes = NodePrefixes(tokens, tree, levels) if texts else None
    scores, errors = settings.processors(drafted.logits, texts, nodes)
    state.fail(errors)
    warped = settings.processors.warp(scores).float() if settings.typical else scores
    if None in settings.typical.values():  # all rows
        (thresholds,) = settings.typical
        return accept_typical(tree, tokens, warped, thresholds)
    if settings.draws:
        accepted = accept_drawn(tree, tokens, lambda node: _draw_after(state, tree, scores, node))
    else:
        accepted = accept_exact(tree, tokens, settings.choose(scores, None))
    for thresholds, rows in settings.typical.items():
        assert rows is not None
        accepted = accepted.replaced(rows, accept_typical(tree, tokens, warped, thresholds))
    return accepted


def _draw_after(
    state: DecodingState,
    tree: TreeTensors,
    scores: Tensor,  # (B, N, V)
    node: Tensor,  # (B,) long
) -> Tensor:  # (B,) long
    """The backbone's token after a node of each row."""
    depth = tree.depths.expand(len(node), -1).gather(1, node[:, None])[:, 0]
    keys = keys_after(state.draws, state.lengths, depth)[:, None]
    if scores.shape[1] > 1:
        first = torch.arange(0, scores.shape[0] * scores.shape[1], scores.shape[1], device=node.device)
        scores = scores.flatten(0, 1).index_select(0, first + node)[:, None]  # a gather would take twenty times as long
    return state.settings.choose(scores, keys)[:, 0]


def keep(
    state: DecodingState,
    drafted: Drafted,
    accepted: Accepted,
    always: bool,  # move keys and values even if all are in place, rather than look
) -> Tensor:  # (B, D + 3) long: the tokens of every path and after them, the path's length, the next root
    """Move the accepted keys and values behind the committed ones."""
    if _in_kernels(drafted.logits):
        path = accepted.node, accepted.path, accepted.length, accepted.bonus
        held = state.active, state.slot, state.hidden, state.root, state.lengths
        packet, source, target = torch.ops.medusa.keep(drafted.tokens, drafted.hidden, *path, *held)
    else:
        packet, source, target = _advance(state, drafted, accepted, always)
    if state.history is not None:
        state.history.extend(packet[:, :-2], accepted.length, accepted.bonus)
    if len(source):
        state.cache.keep(source, target)
    return packet


def _advance(
    state: DecodingState, drafted: Drafted, accepted: Accepted, always: bool
) -> tuple[Tensor, Tensor, Tensor]:  # the result of `keep`; slots to move and where to, (B, D + 1), or (0, D + 1) if in place
    """Let the rows stand behind their accepted paths, as `medusa::keep` does where it can."""
    nodes = accepted.path.clamp(min=0)
    tokens = drafted.tokens.gather(1, nodes)
    rows = torch.arange(len(tokens), device=tokens.device)
    state.hidden.copy_(drafted.hidden[rows, accepted.node])
    state.root.copy_(accepted.bonus)
    # Nodes 0, 1, 2, ... right behind the row are in place.
    in_place = (state.lengths == state.slot) & (accepted.node == accepted.length - 1) | ~state.active
    moved = len(tokens) if always or not in_place.all() else 0
    behind = state.lengths[:, None] + torch.arange(nodes.shape[1], device=tokens.device)
    state.lengths.add_(accepted.length * state.active)
    packet = torch.cat([tokens, torch.stack([accepted.length, accepted.bonus], 1)], 1)
    return packet, (state.slot + nodes)[:moved], behind[:moved]


def _in_kernels(logits: Tensor) -> bool:
    """Whether acceptance has kernels here."""
    return logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16) and are_loaded()


def last_roots(state: DecodingState) -> list[list[int]] | None:
    """The roots as paths if each ends its row, so that nothing is left to verify; else None."""
    for row in state.rows:
        own = row.options
        last = row.root in own.eos_token_ids or len(row.generated) + 1 >= own.max_new_tokens
        if row.finish_reason is None and not last:
            return None
    return [[row.root] for row in state.rows]


def emit(state: DecodingState, paths: list[list[int]]) -> list[list[int]]:
    """Append the accepted tokens of every row, up to the one that ends it, where plain decoding would end too."""
    emitted: list[list[int]] = []
    for number, (row, path) in enumerate(zip(state.rows, paths, strict=True)):
        emitted.append([])
        if row.finish_reason:
            continue
        for token in path:
            row.generated.append(token)
            emitted[number].append(token)
            try:
                reason = _finish_reason(row, token)
            except Exception as error:  # criteria are foreign code, which may raise anything
                state.fail({number: error})
                break
            if reason:
                state.end(number, reason)
                break
    return emitted


def _finish_reason(row: Row, token: int) -> str | None:
    own = row.options
    if token in own.eos_token_ids:
        return "eos"
    if row.ends is not None and row.ends(token):
        return "stop"
    if own.stopping_criteria:
        so_far = row.text().tokens[None]
        if any(bool(torch.as_tensor(criterion(so_far, None)).all()) for criterion in own.stopping_criteria):
            return "stop"
    return "length" if len(row.generated) >= own.max_new_tokens else None


def check_request(
    model: Decodable, ids: Tensor, attention_mask: Tensor | None, tree: Tree, options: DecodingOptions
) -> tuple[Tensor, Tensor | None]:
    """Check a request before any work is done; returns ids and mask on the model's device."""
    ids, attention_mask = check_prompts(model, ids, attention_mask)
    tree.check(model.num_heads, model.scored)
    longest = ids.shape[1] if attention_mask is None else int(attention_mask.sum(-1).max())
    check_length(longest, options.max_new_tokens, model.max_length)
    return ids, attention_mask


def check_length(prompt_tokens: int, max_new_tokens: int, max_length: int | None, option: str = "max_new_tokens") -> None:
    """Check that a prompt and its continuation fit the model.

    Args:
        max_length: maximum number of tokens in a row; None: no limit.
        option: the user's name for max_new_tokens, for the error.

    Raises:
        ContextOverflow: they do not fit.
    """
    if max_length is not None and prompt_tokens + max_new_tokens > max_length:
        left = max_length - prompt_tokens
        raise ContextOverflow(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed the context of {max_length}; "
            + (f"lower {option} to {left} or shorten the prompt" if left > 0 else "shorten the prompt")
        )


def check_prompts(model: Decodable, ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Check prompts and move them to the model's device; the mask is None if nothing is padded."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.long, torch.int32):
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidInput(f"input_ids is {got}, expected a tensor of integers (batch, length)")
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
