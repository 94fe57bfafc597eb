"""The work: its sizes, the folder it is in, and the time there is, of this slice and in all."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medusa.runs.files import write_text
from medusa.runs.records import claim

# Shares of the whole time. What is left over (a fifth, less what finding the source and starting again take) is for tuning,
# exactness and the bench.
SHARES = {"pretraining": 0.48, "continuations": 0.05, "medusa-1": 0.07, "medusa-2": 0.08}
CLAIM, SECONDS, WARNINGS = "end_to_end.yaml", "seconds.json", "warnings.json"


@dataclass(frozen=True)
class Size:
    """How large everything is.

    The figures for an H100 or H200 are estimates: 110 M parameters take 0.7 GFLOP a token, and at the 30-40 % of its bfloat16
    rate that compiled layers reach it sees 0.3-0.5 M tokens/s, so some 0.2-0.3 G in the 12 minutes of pretraining, about three
    to four passes over the 300 MB of Python that come with a machine-learning environment. Nothing rests on it: the length of
    every schedule is set by what the machine is measured to do.
    """

    # The backbone and its pretraining.
    hidden_size: int
    intermediate_size: int
    layers: int
    attention_heads: int
    vocabulary: int
    most_bytes: int  # of source
    held_out_of: int  # one file in so many, half of them for calibration, half for the bench
    length: int  # tokens of a row
    batch_size: int  # rows of an optimiser step
    micro_batch: int  # rows at a time; halved until they fit
    learning_rate: float
    warmup: int  # steps
    timed_steps: tuple[int, int]  # the rate is measured between these steps
    # What the backbone writes for its heads.
    own_batch: int  # rows written together
    own_prompt: int
    own_new: int
    # The heads.
    head_batch: int  # rows of a step
    head_rate: float
    probed_steps: tuple[int, int]
    # Tuning and bench.
    nodes: tuple[int, ...]
    compiled_nodes: tuple[int, ...]  # each is a graph to compile
    prompt: int
    new: int
    calibration_prompts: int
    bench_prompts: tuple[int, int]  # at least, at most


HUNDRED = Size(
    hidden_size=768,
    intermediate_size=2048,
    layers=12,
    attention_heads=12,
    vocabulary=16384,
    most_bytes=400_000_000,
    held_out_of=50,
    length=1024,
    batch_size=64,  # 65 k tokens: some 4,000 steps; larger batches would leave too few
    micro_batch=64,
    learning_rate=1e-3,
    warmup=200,
    timed_steps=(10, 40),
    own_batch=1024,  # a step's fixed cost is shared by so many rows; their cache takes 12 GB
    own_prompt=128,
    own_new=192,
    head_batch=32,  # of 320 tokens
    head_rate=3e-3,  # the embedded model's heads did best at 5e-3 at half this width, Vicuna's in the paper at 1e-3
    probed_steps=(5, 15),
    nodes=(1, 8, 16, 32, 64, 128),
    compiled_nodes=(1, 16, 64, 128),
    prompt=256,
    new=128,
    calibration_prompts=64,
    bench_prompts=(8, 64),
)
SIZES = {
    "100m": HUNDRED,
    "400m": replace(
        HUNDRED,
        hidden_size=1024,
        intermediate_size=2816,
        layers=24,
        attention_heads=16,
        micro_batch=32,
        learning_rate=6e-4,
        warmup=100,
        timed_steps=(5, 20),
        own_batch=512,
        head_rate=2e-3,
        compiled_nodes=(1, 16, 64),
        bench_prompts=(8, 48),
    ),
    "toy": Size(
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        attention_heads=2,
        vocabulary=384,
        most_bytes=400_000,
        held_out_of=6,
        length=64,
        batch_size=8,
        micro_batch=4,
        learning_rate=3e-3,
        warmup=4,
        timed_steps=(1, 3),
        own_batch=8,
        own_prompt=8,
        own_new=12,
        head_batch=4,
        head_rate=3e-3,
        probed_steps=(1, 2),
        nodes=(1, 4),
        compiled_nodes=(),  # compiling takes a processor minutes
        prompt=12,
        new=10,
        calibration_prompts=4,
        bench_prompts=(2, 3),
    ),
}


class SliceOver(Exception):
    """The time of this slice is used up; the next goes on from here."""


class Work:
    """A folder of finished and half-finished stages, and the clock.

    Args:
        minutes: of this slice.
        total_minutes: of all slices together; the stages share them.
        now: seconds that only grow.

    Raises:
        InvalidInput: the folder holds work of another size or time.
    """

    def __init__(
        self,
        folder: Path,
        size_name: str,
        minutes: float,
        total_minutes: float,
        now: Callable[[], float] = time.monotonic,
    ):
        claim(folder / CLAIM, {"size": size_name, "total_minutes": total_minutes})
        self.folder, self.size, self.now = folder, SIZES[size_name], now
        self.total = 60 * total_minutes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._end, self._worked = now() + 60 * minutes, False
        self._seconds: dict[str, float] = self.read(SECONDS) or {}
        self._stage, self._since = "", 0.0

    def read(self, name: str) -> Any:
        """The JSON of a file in the folder; None where there is none."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, record: Any) -> None:
        write_text(self.folder / name, json.dumps(record, indent=2) + "\n")

    def left(self) -> float:
        """Seconds of this slice."""
        return self._end - self.now()

    def room(self, seconds: float) -> None:
        """Go on if the slice has so many seconds left, or nothing was done in it yet: every slice gets somewhere.

        Raises:
            SliceOver: it has not.
        """
        if self._worked and self.left() < seconds:
            raise SliceOver
        self._worked = True

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Keep the seconds that pass within, and what warns there, such as a step that does not compile."""
        self._stage, self._since = stage, self.now()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            try:
                yield
            finally:
                self._seconds[stage] = self.spent()[stage]
                self._stage = ""
                self.write(SECONDS, self._seconds)
                said = [f"{stage}: {warning.message}" for warning in caught if issubclass(warning.category, RuntimeWarning)]
                self.write(WARNINGS, sorted({*self.warnings(), *said}))

    def warnings(self) -> list[str]:
        return self.read(WARNINGS) or []

    def spent(self) -> dict[str, float]:
        """Seconds of every stage, over all slices."""
        if not self._stage:
            return dict(self._seconds)
        return self._seconds | {self._stage: self._seconds.get(self._stage, 0.0) + self.now() - self._since}

    def left_of_stage(self) -> float:
        """Seconds of the share that the running stage has; of a stage without a share, those of the whole."""
        if self._stage in SHARES:
            return SHARES[self._stage] * self.total - self.spent()[self._stage]
        return self.total - sum(self.spent().values())
