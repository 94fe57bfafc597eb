"""Jobs: the requests of the engine, from the queue to the last delivery."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from medusa.batch.rows import Row
from medusa.batch.state import Decodable
from medusa.decoding import Stepped
from medusa.serving.reports import after_path, logprobs_of, traced
from medusa.serving.requests import Delivery, Request, TokenLogprobs
from medusa.trees.dynamic import DynamicTree
from medusa.trees.static import MedusaTree
from medusa.trees.tensors import Drafter


class Job:
    """A submitted request; `Ticket` for those who submitted it. All but `cancel` belongs to the engine's thread.

    Args:
        ids: (P,) long, its prompt on the model's device.
        drafter: that of its own tree; None: it shares the engine's.
        wake: wakes the engine.
    """

    def __init__(
        self,
        request: Request,
        deliver: Callable[[Delivery], None],
        ids: Tensor,
        drafter: Drafter | None,
        tree: MedusaTree | DynamicTree | None,
        wake: Callable[[], None],
    ):
        self.request, self.ids, self.drafter, self.tree = request, ids, drafter, tree
        self.row = Row(request.options, (request.options.seed, request.number), request.ends)
        self.slot: int = -1  # -1: it waits
        self.done = 0  # number of prompt tokens in the cache
        self.cancelled = False
        self._deliver, self._wake = deliver, wake
        self._submitted, self._queued = time.monotonic(), 0.0
        self._cached = 0
        self._first = True
        self._root: list[TokenLogprobs] = []  # of the next root, if log-probabilities are asked for
        self._prompt: list[TokenLogprobs | None] = [None]  # of the prompt's tokens, if asked for; the first has none

    def cancel(self) -> None:
        """See `Ticket.cancel`."""
        self.cancelled = True
        self._wake()

    def begin(self, cached: int) -> None:
        """Begin its prompt, of which the first `cached` tokens are in the cache."""
        self.done = self._cached = cached
        self._queued = time.monotonic() - self._submitted

    def note_prompt(self, model: Decodable, hidden: Tensor, number: int) -> None:
        """A chunk of the prompt was processed: its hidden states (1, number, d)."""
        if (wanted := self.request.prompt_logprobs) is not None:
            after = self.request.ids[self.done + 1 : self.done + number + 1]
            if after:
                self._prompt += logprobs_of(model.logits(hidden[0, : len(after)]), after, wanted)
        self.done += number

    def note_root(self, logits: Tensor) -> None:
        """The first root was decided from these logits (1, V)."""
        if self.request.logprobs is not None:
            self._root = logprobs_of(logits, [self.row.root], self.request.logprobs)

    def delivery(self, stepped: Stepped, place: int, seconds: float, compiled: bool) -> Delivery:
        """What a step gives this request, which was row `place` of it."""
        tokens, row = stepped.tokens[place], self.row
        tree = stepped.drafted.tree if stepped.drafted is not None else None
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = [*self._root]
            if tree is not None and tokens:
                logprobs += after_path(stepped, place, row.root, self.request.logprobs)
            logprobs, self._root = logprobs[: len(tokens)], logprobs[len(tokens) :]
        first = dict(
            cached=self._cached,
            queued_seconds=self._queued,
            prompt_logprobs=self._prompt if self.request.prompt_logprobs is not None else None,
        )
        delivery = Delivery(
            tokens=tokens,
            logprobs=logprobs,
            finish_reason=row.finish_reason,  # type: ignore[arg-type]
            drafted=tree.num_nodes - 1 if tree is not None else 0,
            depth=tree.lineage.shape[-1] - 1 if tree is not None else 0,
            seconds=seconds,
            compiled=compiled,
            nodes=traced(stepped, place) if self.request.trace else None,
            error=row.error,
            **(first if self._first else {}),  # type: ignore[arg-type]
        )
        self._first = False
        return delivery

    def send(self, delivery: Delivery) -> None:
        """Deliver; a receiver that fails is no longer there, and its request is cancelled."""
        try:
            self._deliver(delivery)
        except Exception:  # foreign code
            self.cancelled = True
