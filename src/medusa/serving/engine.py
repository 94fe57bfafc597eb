"""The engine: requests join and leave the rows of a pool between two steps; one thread owns the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from medusa.batch.state import Decodable, DecodingState, overhang
from medusa.decoding import check_request, step
from medusa.errors import ContextOverflow
from medusa.kernels.workers import release_workers
from medusa.serving.graphs import Graphs
from medusa.serving.jobs import Job
from medusa.serving.requests import Delivery, Load, QueueFull, Request
from medusa.serving.slots import Slots
from medusa.serving.trees import Kind, TreeByLoad
from medusa.trees.dynamic import DynamicTree
from medusa.trees.files import Tree
from medusa.trees.static import MedusaTree
from medusa.trees.tensors import Drafter

STALLED = 300.0  # seconds without progress after which the engine does not count as alive; compiling a step takes long
PAUSE = 1.0  # seconds without requests after which a graph is made


@dataclass(frozen=True)
class Part:
    """Slots that are stepped together."""

    first: int
    rows: int
    tree: MedusaTree | DynamicTree
    state: DecodingState
    wide: DecodingState | None = None  # the same rows, and idle ones behind them up to the number of a graph

    def with_tree(self, tree: MedusaTree | DynamicTree, drafter: Drafter) -> Part:
        """The same slots with another tree; the settings of their rows stay as they are."""
        state, wide = (each and replace(each, drafter=drafter, _levels=None) for each in (self.state, self.wide))
        assert state is not None
        return Part(self.first, self.rows, tree, state, wide)


class Engine:
    """Decodes requests of different settings together. A request's tokens depend on itself alone; see `Serves`.

    Between two steps, requests that have ended or were cancelled leave, and one chunk of one waiting prompt is processed. The
    rows that decode stand in the first slots, so that a step costs what a batch of their number costs; rows that ask for a tree
    of their own are stepped by themselves, and stand in the last unless there are no others.

    Args:
        model: a `MedusaModel`, or another `Decodable` with a tree.
        tree: the tree for requests that name none; None: the model's.
        slots: number of requests decoded at a time.
        capacity: number of tokens that a slot holds: prompt, new tokens and tree.
        queue: number of requests that may wait for a slot.
        chunk: number of prompt tokens processed between two steps.
        compiled: whether to compile steps, while there is nothing to decode; until a graph is ready, steps run uncompiled.
        measured: whether the times of steps choose among the trees and plain decoding; see `TreeByLoad`.
    """

    def __init__(
        self,
        model: Any,
        slots: int,
        capacity: int,
        tree: Tree | None = None,
        queue: int = 256,
        chunk: int = 128,
        compiled: bool = False,
        measured: bool = False,
    ):
        self.model: Decodable = model
        self.tree: Tree = model.tree if tree is None else tree
        self.tree.check(model.num_heads, model.scored)
        self.slots, self.capacity, self.queue, self.chunk = slots, capacity, queue, chunk
        self._by_load = TreeByLoad(self.tree, measured)
        self._drafters = {tree: tree.drafter(model.device) for tree in self._by_load.all}
        readers = [drafter for drafter in self._drafters.values() if drafter.reads_history]
        self._pool = Slots(model, slots, capacity, (readers or [*self._drafters.values()])[0])
        self._at: list[Job | None] = [None] * slots  # the request in each slot
        self._reading: Job | None = None  # the request whose prompt is being processed
        self._graphs = Graphs(model, self._pool, self._by_load, self._drafters) if compiled else None
        self._parts: list[Part] | None = None  # what is stepped; None: to be arranged
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = self._cancelling = False
        self._idle = True  # no row was stepped with the shared tree just now
        self._last = time.monotonic()
        release_workers()  # from here on its own thread computes
        self._thread = threading.Thread(target=self._run, name="medusa-engine", daemon=True)
        self._thread.start()

    # From any thread.

    def submit(self, request: Request, deliver: Callable[[Delivery], None]) -> Job:
        """See `Serves.submit`."""
        tree = None if request.tree is None else request.tree.for_batch(1)
        ids, _ = check_request(self.model, torch.tensor([request.ids]).long(), None, tree or self.tree, request.options)
        drafter = None if tree is None else tree.drafter(self.model.device)
        room = self._room(drafter)
        if len(request.ids) + request.options.max_new_tokens > room:
            raise ContextOverflow(
                f"{len(request.ids)} prompt tokens and {request.options.max_new_tokens} new ones exceed the {room} that a slot "
                f"of {self.capacity} has room for beside the tree; shorten the prompt, lower max_new_tokens or raise --capacity"
            )
        job = Job(request, deliver, ids[0], drafter, tree, self._notify)
        with self._wake:
            if self._closing or not self._thread.is_alive():
                raise QueueFull("the engine is shutting down; send the request again later")
            if len(self._waiting) + sum(held is not None for held in self._at) >= self.slots + self.queue:
                raise QueueFull(f"{len(self._waiting)} requests are waiting, as many as may; send the request again later")
            self._waiting.append(job)
            self._wake.notify_all()
        return job

    def room(self, tree: Tree | None = None) -> int:
        """See `Serves.room`."""
        return self._room(None if tree is None else tree.for_batch(1).drafter(self.model.device))

    def _room(self, drafter: Drafter | None) -> int:
        """The same beside the trees of a drafter; None: beside those that requests share."""
        return self.capacity - max(map(overhang, self._drafters.values() if drafter is None else [drafter]))

    def load(self) -> Load:
        """What it is doing now."""
        with self._wake:  # a request that is moved from the queue to a slot is never in neither
            running, waiting = sum(job is not None for job in self._at), len(self._waiting)
        return Load(
            running=running,
            waiting=waiting,
            slots=self.slots,
            cached_tokens=self._pool.committed,
            capacity=self.capacity,
            nodes=len(self._by_load.used),
            last_step=self._last if running or waiting else time.monotonic(),
            speeds=self._by_load.speeds,
            graphs_left=self._graphs.left if self._graphs is not None else 0,
        )

    def alive(self) -> bool:
        """See `Serves.alive`."""
        return self._thread.is_alive() and time.monotonic() - self.load().last_step < STALLED

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; finish (`drain`) or cancel those there are; after `timeout` seconds, cancel them.

        Args:
            timeout: seconds to wait for the requests, and then for the step that runs; None: as long as it takes.
        """
        with self._wake:
            self._closing, self._cancelling = True, self._cancelling or not drain
            self._wake.notify_all()
        self._thread.join(timeout)
        if drain and self._thread.is_alive():
            self._cancelling = True
            self._thread.join(timeout)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    # From the engine's thread alone.

    @torch.inference_mode()
    def _run(self) -> None:
        """Decode until the engine is closed."""
        while self._awaits():
            try:
                if self._graphs is not None and not (self._waiting or any(self._at)):
                    self._graphs.make()
                    self._by_load.forget()
                    continue
                self._leave()
                self._read()
                for part in self._arranged():
                    self._step(part)
            except Exception as error:  # a fault of the engine must not end it
                for job in filter(None, [*self._at]):
                    self._end(job, "error", error)
            self._last = time.monotonic()

    def _awaits(self) -> bool:
        """Wait for something to do, if only a graph to be made; False: the engine is closed and nothing is left."""
        with self._wake:
            while not (self._waiting or any(self._at) or self._closing):
                self._last = time.monotonic()
                graphs = self._graphs is not None and self._graphs.left
                if not self._wake.wait(PAUSE if graphs else None) and graphs:
                    return True
            return bool(self._waiting or any(self._at))

    def _leave(self) -> None:
        """End the requests that were cancelled."""
        with self._wake:
            jobs = [job for job in (*self._at, *self._waiting) if job is not None]
        for job in jobs:
            if job.cancelled or self._cancelling:
                self._end(job, "cancelled")

    def _read(self) -> None:
        """Process a chunk of a prompt, of the next request if none has been begun."""
        if self._reading is None:
            free = [slot for slot, held in enumerate(self._at) if held is None]
            with self._wake:
                if not free or not self._waiting:
                    return
                job = self._waiting.popleft()
                job.slot = self._pool.choose(free, job.request.ids)
                self._at[job.slot] = self._reading = job
            anew = job.request.prompt_logprobs is not None or not job.request.reuse
            job.begin(0 if anew else self._pool.cached(job.slot, job.request.ids))
            self._pool.take(job.slot, job.row, job.ids, job.done)
            self._parts = None
        job = self._reading
        number = min(self.chunk, len(job.ids) - job.done)
        try:
            hidden = self._pool.read(job.slot, job.ids, job.done, number)
            job.note_prompt(self.model, hidden, number)
            if job.done == len(job.ids):
                last = hidden[:, -1].clone(memory_format=torch.contiguous_format)
                logits = self.model.logits(last)
                self._pool.start(job.slot, job.ids, last, logits)
                job.note_root(logits)
                self._reading, self._parts = None, None
                if job.row.error is not None:
                    self._end(job, "error", job.row.error)
        except Exception as error:  # of the model or of a processor: this request fails, others do not
            self._end(job, "error", error, keep=False)

    def _arranged(self) -> list[Part]:
        """The parts of the pool to be stepped."""
        live = [job for job in self._at if job is not None and job is not self._reading]
        shared = [job for job in live if job.tree is None]
        before = self._by_load.used
        tree = self._by_load.choose(_kind(shared), new=self._idle) if shared else before
        self._idle = not shared
        if self._parts is not None:
            if tree != before:
                self._parts[0] = self._parts[0].with_tree(tree, self._drafters[tree])
            return self._parts
        groups: dict[MedusaTree | DynamicTree | None, list[Job]] = {None: shared} if shared else {}
        for job in live:
            if job.tree is not None:
                groups.setdefault(job.tree, []).append(job)
        self._parts, stop = [], self.slots
        for own, jobs in groups.items():
            # The first stand in the first slots, where steps are compiled; the others, in the last.
            first = width = 0
            if self._parts:
                first = stop = stop - len(jobs)
            elif self._graphs is not None:
                width = self._graphs.width(len(jobs))
            self._gather(jobs, first)
            drafter = jobs[0].drafter or self._drafters[tree]
            wide = self._pool.part(0, width, drafter) if 0 < width <= self.slots - len(live) + len(jobs) else None
            self._parts.append(
                Part(first, len(jobs), tree if own is None else own, self._pool.part(first, first + len(jobs), drafter), wide)
            )
        return self._parts

    def _gather(self, jobs: list[Job], first: int) -> None:
        """Move requests to the slots from `first` on; those that stand there already stay."""
        places = range(first, first + len(jobs))
        holes = [slot for slot in places if self._at[slot] not in jobs]
        for job, hole in zip([job for job in jobs if job.slot not in places], holes, strict=True):
            other, slot = self._at[hole], job.slot
            self._pool.swap(slot, hole)
            self._at[slot], self._at[hole] = other, job
            job.slot = hole
            if other is not None:
                other.slot = slot

    def _step(self, part: Part) -> None:
        """Step some slots, and deliver what their requests get."""
        jobs = [job for job in self._at[part.first : part.first + part.rows] if job is not None]
        compiled = self._compiled(part)
        model, state = compiled or (self.model, part.state)
        began, base = time.perf_counter(), state.base
        try:
            stepped = step(model, state)
        except Exception as error:  # the model failed on these rows: what is in their slots cannot be trusted
            for job in jobs:
                self._end(job, "error", error, keep=False)
            return
        seconds = time.perf_counter() - began
        if stepped.drafted is not None:
            self._pool.stepped(part.first, part.first + len(state.rows), base)
        for place, job in enumerate(jobs):
            self._deliver(job, job.delivery(stepped, place, seconds, compiled is not None))
        if stepped.drafted is not None and jobs[0].tree is None:
            going = [len(stepped.tokens[place]) for place, job in enumerate(jobs) if job.row.finish_reason is None]
            self._by_load.note(time.perf_counter() - began, going)

    def _compiled(self, part: Part) -> tuple[Decodable, DecodingState] | None:
        """The compiled model and the rows of its graph, if there is one for this step."""
        if self._graphs is None or part.wide is None or part.state.settings.processors.guides:  # grammars add shapes
            return None
        return (self._graphs.model, part.wide) if self._graphs.ready(part.rows, part.tree, part.wide.base) else None

    def _deliver(self, job: Job, delivery: Delivery) -> None:
        if delivery.finish_reason is not None:
            self._release(job)
        job.send(delivery)

    def _end(self, job: Job, reason: Any, error: Exception | None = None, keep: bool = True) -> None:
        """End a request from outside of its decoding."""
        with self._wake:
            if job in self._waiting:
                self._waiting.remove(job)
        self._release(job, keep)
        job.send(Delivery([], finish_reason=reason, error=error))

    def _release(self, job: Job, keep: bool = True) -> None:
        if job.slot >= 0 and self._at[job.slot] is job:
            self._pool.free(job.slot, keep)
            self._at[job.slot], self._parts = None, None
        if self._reading is job:
            self._reading = None


def _kind(jobs: list[Job]) -> Kind:
    """The kind of a step of these requests."""
    longest = max(job.row.committed for job in jobs)
    return Kind.of(len(jobs), longest, any(job.request.options.processors.guide is not None for job in jobs))
