"""The pool: rows that decode together; when a request ends, the next takes its row at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from medusa.batch.rows import DecodingOptions, Row
from medusa.batch.state import Decodable, DecodingState, admit, room, vacant
from medusa.data.prompts import left_padded
from medusa.decoding import check_request, raise_errors, step
from medusa.kernels.workers import release_workers
from medusa.trees.files import Tree

JOIN_SHARE = 16  # requests join once 1 / JOIN_SHARE of the rows is free: a pass over several prompts costs little more


@dataclass(frozen=True)
class Request:
    """A prompt to continue. Its output depends on its seed, never on the rows beside it."""

    ids: list[int]
    seed: int = 0
    tag: Any = None  # the caller's name for it


@dataclass(frozen=True)
class Finished:
    """A request and its continuation."""

    request: Request
    tokens: list[int]
    finish_reason: str  # eos, stop or length


def decode_queue(
    model: Decodable, take: Callable[[], Request | None], rows: int, tree: Tree, options: DecodingOptions
) -> Iterator[Finished]:
    """Decode requests in a batch of rows. Each gets the tokens that `decode` gives it alone with its seed.

    Args:
        take: returns the next request, or None if there is none now. It is called again whenever a request ends, since that
            may lead to new ones; decoding ends when no request is left.
        rows: number of requests decoded at a time.

    Raises:
        InvalidInput, ContextOverflow, InvalidTree: a request cannot be decoded (see `decode`).
    """
    state: DecodingState | None = None
    requests: list[Request | None] = [None] * rows
    while True:
        free = [row for row in range(rows) if requests[row] is None]
        joining = {}
        if len(free) * JOIN_SHARE >= rows:
            for row in free:
                if (request := take()) is None:
                    break
                requests[row] = joining[row] = request
        if joining:
            if state is None:
                drafter = tree.for_batch(rows).drafter(model.device)
                longest = max(len(request.ids) for request in joining.values())
                state = vacant(model, rows, room(model, longest, drafter, options.max_new_tokens), drafter)
            _join(model, state, joining, tree, options)
        if state is None or state.finished:
            release_workers()
            return
        step(model, state)
        raise_errors(state)
        for row, request in enumerate(requests):
            reason = state.rows[row].finish_reason
            if request is not None and reason is not None:
                requests[row] = None
                yield Finished(request, state.rows[row].generated, reason)


def _join(model: Decodable, state: DecodingState, joining: dict[int, Request], tree: Tree, options: DecodingOptions) -> None:
    """Admit requests to rows, left-padded to the longest of them."""
    ids, mask = left_padded([request.ids for request in joining.values()])
    ids, checked = check_request(model, ids, mask, tree, options)
    admit(model, state, list(joining), [Row(options, (request.seed, 0)) for request in joining.values()], ids, checked)
    raise_errors(state)
