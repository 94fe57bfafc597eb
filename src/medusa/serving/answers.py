"""Answers: what the engine delivers for a call, as text that is safe to send, with its log-probabilities, counts and end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from medusa.serving.calls import Call, Service
from medusa.serving.pieces import AnswerText, Piece
from medusa.serving.problems import Problem, problem_of
from medusa.serving.reports import step_record
from medusa.serving.requests import Delivery, Ticket, TokenLogprobs

log = logging.getLogger("medusa.serve")
ENDS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Update:
    """What a step adds to one answer."""

    index: int
    text: str
    pieces: list[Piece]  # tokens whose text is now part of the answer
    logprobs: list[TokenLogprobs] | None  # theirs
    finish_reason: str | None = None  # stop, length or abort
    stop_reason: str | int | None = None  # the stop string or token that ended it
    trace: dict[str, Any] | None = None


@dataclass
class Answer:
    """One answer so far."""

    call: Call
    content: AnswerText
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    cached: int = 0
    queued_seconds: float = 0.0
    first_at: float | None = None  # time.monotonic() of its first token
    last_at: float | None = None  # of its last tokens
    gap: float = 0.0  # seconds between these and the ones before
    _sent: int = 0  # characters
    _released: int = 0  # pieces

    def take(self, delivery: Delivery, service: Service, index: int) -> Update:
        """Take what a step delivers; returns what can be sent."""
        tokens, ended = list(delivery.tokens), ENDS.get(delivery.finish_reason or "")
        self.tokens += len(tokens)
        if tokens:
            now = time.monotonic()
            self.first_at = self.first_at or now
            self.last_at, self.gap = now, now - (self.last_at or now)
            self.steps += 1
            self.drafted += delivery.drafted
            self.accepted += len(tokens) - 1
        self.cached = max(self.cached, delivery.cached)
        self.queued_seconds += delivery.queued_seconds
        if delivery.prompt_logprobs is not None:
            self.prompt_logprobs = delivery.prompt_logprobs
        if delivery.finish_reason == "eos" and tokens:
            last = tokens.pop()  # the token that ends an answer is not part of it
            if last in self.call.stop_token_ids:
                self.stop_reason = last
                if self.call.include_stop:
                    tokens.append(last)
        before = len(self.content.pieces)
        for place, token in enumerate(tokens):
            if self.content.stopped is not None:
                break
            self.content.put(token)
            if delivery.logprobs is not None:
                self.logprobs.append(delivery.logprobs[place])
        if ended is not None:
            self.content.end()
            self.finish_reason = "stop" if self.content.stopped is not None else ended
            self.stop_reason = self.content.stopped or self.stop_reason
        trace = None
        if self.call.trace != "none" and delivery.tokens:
            pieces = [piece.text for piece in self.content.pieces[before:]]
            trace = {"step": self.steps, **step_record(delivery, pieces, service.texts)}
        return self._update(index, trace)

    def abort(self, index: int) -> Update:
        """End it before its time."""
        self.content.end()
        self.finish_reason = "abort"
        return self._update(index, None)

    def _update(self, index: int, trace: dict[str, Any] | None) -> Update:
        content, done = self.content, self.finish_reason is not None
        end = len(content.text) if done else content.safe
        upto = self._released
        while upto < len(content.pieces):  # those that begin behind a stop string are not part of the answer
            if content.pieces[upto].start >= end and (not done or content.stopped is not None):
                break
            upto += 1
        text, pieces = content.text[self._sent : end], content.pieces[self._released : upto]
        logprobs = self.logprobs[self._released : upto] if self.call.logprobs else None
        self._sent, self._released = max(end, self._sent), upto
        if self.call.drops_answer:
            text, pieces, logprobs = "", [], [] if logprobs is not None else None
        reason, by = (self.finish_reason, self.stop_reason) if done else (None, None)
        return Update(index, text, pieces, logprobs, reason, by, trace)


class Answers:
    """The answers to the calls of one HTTP request. They end when they are complete, when time is up, or with `cancel`.

    Args:
        calls: the calls; their answers are numbered in order.
        request_id: the id of the HTTP request, for the log.
        route: its path, for the log.
        client: who asks, for its share of the queue.
    """

    def __init__(self, service: Service, calls: Sequence[Call], request_id: str, route: str, client: str):
        self._service, self._id, self._route, self._client = service, request_id, route, client
        self.answers = [Answer(call, text) for call in calls for text in call.texts]
        self._requests = [request for call in calls for request in call.requests]
        self.prompt_tokens = sum(len(call.ids) for call in calls)
        self.started = time.monotonic()
        self._deliveries: asyncio.Queue[tuple[int, Delivery]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._tickets: list[Ticket] = []
        self._open = set(range(len(self.answers)))
        self._held = 0  # answers that count for the client's share
        self._logged = False

    def submit(self) -> None:
        """Hand the requests to the engine; all or none.

        Raises:
            Problem: the client has its share, the queue is full, or a request cannot be decoded.
        """
        try:
            self._take_share()
            for index, request in enumerate(self._requests):
                self._tickets.append(self._service.engine.submit(request, partial(self._deliver, index)))
        except Exception as error:
            self.cancel("refused")
            problem = problem_of(error)
            if problem.status == 503:
                self._service.metrics.rejected.inc()
            if problem.status == 429:
                self._service.metrics.over_share.inc()
            raise problem from error

    def _take_share(self) -> None:
        number, share, held = len(self._requests), self._service.settings.max_per_client, self._service.held
        if share and number > share:
            raise Problem(f"the call asks for {number} answers, expected at most {share}; send several calls")
        if share and held[self._client] + number > share:
            raise Problem(
                f"{held[self._client]} answers to this client are running or waiting, and {share} may at a time; send the call "
                "again when they have ended",
                429,
                code="rate_limit_exceeded",
                retry_after=1,
            )
        held[self._client] += number
        self._held = number

    def _deliver(self, index: int, delivery: Delivery) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._deliveries.put_nowait, (index, delivery))

    async def updates(self) -> AsyncIterator[Update]:
        """What each step adds, until every answer is complete. Stopping early cancels the rest.

        Raises:
            Problem: the engine failed, or it shuts down.
        """
        metrics, reason = self._service.metrics, "cancelled"
        timeout = self._service.settings.request_timeout
        try:
            while self._open:
                left = None if not timeout else self.started + timeout - time.monotonic()
                try:
                    index, delivery = await asyncio.wait_for(self._deliveries.get(), left)
                except TimeoutError:
                    reason = "abort"
                    for index in sorted(self._open):
                        yield self.answers[index].abort(index)
                        metrics.finished(self.answers[index], self.started)
                    self._open.clear()
                    return
                if index not in self._open:
                    continue
                if delivery.finish_reason == "error":
                    reason = "error"
                    log.error("%s: the engine failed", self._id, exc_info=delivery.error)
                    raise problem_of(delivery.error or RuntimeError())
                if delivery.finish_reason == "cancelled":
                    raise Problem("the server is shutting down", 503, code="shutting_down", retry_after=5)
                answer = self.answers[index]
                update = answer.take(delivery, self._service, index)
                metrics.delivered(answer, delivery, self.started)
                if update.finish_reason is not None:
                    self._open.discard(index)
                    metrics.finished(answer, self.started)
                yield update
            reason = ",".join(dict.fromkeys(answer.finish_reason or "" for answer in self.answers))
        finally:
            self.cancel(reason)

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop what still runs, and write the line of the log."""
        for ticket in self._tickets:
            ticket.cancel()  # of a request that has ended it does nothing
        if self._logged:
            return
        self._logged = True
        self._service.held -= Counter({self._client: self._held})  # drops clients that hold nothing
        if self._open and reason in ("cancelled", "error"):
            self._service.metrics.ended.labels(self._service.name, reason).inc(len(self._open))
        first = min((answer.first_at for answer in self.answers if answer.first_at is not None), default=None)
        tokens, steps = sum(a.tokens for a in self.answers), sum(a.steps for a in self.answers)
        log.info(
            "%s %s %s prompt=%d output=%d queued=%.3fs first=%s total=%.3fs tokens/step=%.2f",
            self._id,
            self._route,
            reason,
            self.prompt_tokens,
            tokens,
            max(answer.queued_seconds for answer in self.answers),
            "-" if first is None else f"{first - self.started:.3f}s",
            time.monotonic() - self.started,
            tokens / max(1, steps),
        )

    def usage(self) -> dict[str, Any]:
        """OpenAI's account of the tokens so far."""
        output = sum(answer.tokens for answer in self.answers if not answer.call.drops_answer)
        accepted = sum(answer.accepted for answer in self.answers)
        rejected = sum(answer.drafted for answer in self.answers) - accepted
        cached = sum({id(answer.call): answer.cached for answer in reversed(self.answers)}.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": output,
            "total_tokens": self.prompt_tokens + output,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": max(0, rejected),
            },
        }
