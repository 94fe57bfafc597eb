"""The loop: draft with the heads, verify the tree in one pass, accept a path, keep its cache rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from medusa.acceptance import Accepted, accept_exact, accept_typical
from medusa.errors import ContextOverflow, InvalidInput
from medusa.sampling import NodePrefixes, choose, levels_of
from medusa.state import Decodable, DecodingOptions, DecodingState, admit, room, vacant
from medusa.trees.files import Tree
from medusa.trees.tensors import Drafted


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


@torch.inference_mode()
def step(model: Decodable, state: DecodingState, options: DecodingOptions) -> list[list[int]]:
    """Draft, verify, accept, keep; returns the new tokens of every row."""
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
    """The longest path of every row's tree that agrees with the backbone."""
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
    """Move the accepted keys and values behind the committed ones; returns the tokens of every path."""
    tokens = drafted.tokens.gather(1, accepted.path.clamp(min=0))
    rows = torch.arange(len(tokens), device=tokens.device)
    state.hidden, state.root = drafted.hidden[rows, accepted.node], accepted.bonus
    if state.history is not None:
        state.history.extend(tokens, accepted.length, accepted.bonus)
    # The one host-device sync of the step.
    packet = torch.cat([tokens, torch.stack([accepted.node, accepted.length, accepted.bonus], 1)], 1).tolist()
    base = state.base
    moved = any(
        committed != base or node != length - 1  # nodes 0, 1, 2, ... right behind the row are in place
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
    """The roots as paths if each ends its row, so that nothing is left to verify; else None."""
    for root, tokens, done in zip(state.host_roots, state.generated, state.finish_reasons, strict=True):
        if not done and root not in options.eos_token_ids and len(tokens) + 1 < options.max_new_tokens:
            return None
    return [[root] for root in state.host_roots]


def emit(state: DecodingState, options: DecodingOptions, paths: list[list[int]]) -> list[list[int]]:
    """Append the accepted tokens of every row, up to the one that ends it, where plain decoding would end too."""
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
