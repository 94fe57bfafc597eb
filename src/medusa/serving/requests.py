"""Requests: what the engine is asked for, and what it delivers while it decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from medusa.errors import MedusaError

if TYPE_CHECKING:  # a proxy that tells clients of problems needs no torch
    from medusa.batch.rows import DecodingOptions
    from medusa.trees.files import Tree

FinishReason = Literal["eos", "stop", "length", "cancelled", "error"]


class QueueFull(MedusaError):
    """The engine's queue is full, or the engine is shutting down; the request may be sent again later."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue, with settings of its own. Its output depends on nothing else: not on its row or its company."""

    ids: list[int]
    options: DecodingOptions  # limit, sampling, processors, ids that end it, seed: of this request alone
    number: int = 0  # its stream of draws is (options.seed, number): several answers to one prompt differ in it
    tree: Tree | None = None  # None: the engine chooses; MedusaTree([]) decodes plainly
    logprobs: int | None = None  # number of likeliest tokens reported beside each token's own; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    trace: bool = False  # deliver the whole tree of every step
    reuse: bool = True  # begin with the keys and values of an earlier text that begins alike; False: read the whole prompt
    ends: Callable[[int], bool] | None = None  # called with each token in order; True ends the request: reason "stop"


@dataclass(frozen=True)
class TokenLogprobs:
    """Raw log-probabilities (before logits processors) of a token and of the likeliest tokens in its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # likeliest first


@dataclass(frozen=True)
class TracedNode:
    """A node of a traced tree."""

    token: int
    parent: int  # index of its parent; the root is its own
    probability: float  # the backbone's, after the parent's path; the root's is 1
    accepted: bool


@dataclass(frozen=True)
class Delivery:
    """What a step of the engine delivers to a request. The last one has a finish reason."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one per token, if asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first delivery, if asked for; the first token has none
    finish_reason: FinishReason | None = None
    drafted: int = 0  # nodes below the root in the step's tree
    depth: int = 0  # depth of the step's tree: the most draft tokens that it could have accepted
    seconds: float = 0.0  # duration of the step
    compiled: bool = False  # whether the step was compiled
    cached: int = 0  # prompt tokens found in the cache; with the first delivery
    queued_seconds: float = 0.0  # time in the queue; with the first delivery
    nodes: list[TracedNode] | None = None  # the step's tree, if traced
    error: Exception | None = None  # why it failed, with the reason "error"


@dataclass(frozen=True)
class Speed:
    """The speed of a tree, as the engine has measured it."""

    rows: int  # that decode together
    length: int  # of the longest of them, rounded up
    nodes: int  # of the tree; 1: plain decoding
    speedup: float  # tokens per second over those of plain decoding


@dataclass(frozen=True)
class Load:
    """What the engine is doing now."""

    running: int  # requests in slots
    waiting: int  # requests in the queue
    slots: int
    cached_tokens: int  # committed tokens in the cache, of all slots
    capacity: int  # tokens that a slot holds
    nodes: int  # of the tree in use; 1: plain decoding
    last_step: float  # time.monotonic() of the last step, or of the last time that nothing was to be done
    speeds: Sequence[Speed] = ()  # what has been measured of trees
    graphs_left: int = 0  # compiled steps that are still to be made


class Ticket(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """Stop decoding it before the next step; a last delivery says "cancelled". May be called from any thread."""


class Serves(Protocol):
    """What the HTTP server needs from the engine. Every method may be called from any thread."""

    def submit(self, request: Request, deliver: Callable[[Delivery], None]) -> Ticket:
        """Queue a request. `deliver` is called from the engine's thread and must return at once.

        Raises:
            QueueFull: see there.
            ContextOverflow, InvalidInput, InvalidTree: the request cannot be decoded.
        """

    def room(self, tree: Tree | None = None) -> int:
        """The most tokens of a prompt and its answer together, for a request with this tree."""

    def load(self) -> Load: ...

    def alive(self) -> bool:
        """Whether the engine's thread runs and has made progress."""

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; finish (`drain`) or cancel those there are, then stop the thread."""
