"""Measurement: decoders timed end to end on the same prompts, interleaved in one run, with intervals."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from medusa.evaluation.decoders import Decoded, Decoder

RESAMPLES, LEVEL = 2000, 0.95


class Totals(NamedTuple):
    """Sums over decoded items; each a scalar, or (R,) for R resamples of the items."""

    tokens: Tensor
    seconds: Tensor
    decode_tokens: Tensor  # without those that the prefill decided
    decode_seconds: Tensor  # without the prefill
    row_steps: Tensor
    steps: Tensor

    @property
    def tokens_per_second(self) -> Tensor:
        """New tokens over end-to-end seconds, prefill included."""
        return self.tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> Tensor:
        """New tokens per second, without the seconds and tokens of the prefill."""
        return self.decode_tokens / self.decode_seconds

    @property
    def acceleration_rate(self) -> Tensor:
        """New tokens per decoding step and row (paper B.1)."""
        return self.tokens / self.row_steps

    @property
    def step_seconds(self) -> Tensor:
        """Seconds of a decoding step, without the prefill."""
        return self.decode_seconds / self.steps


@dataclasses.dataclass
class Measurement:
    """The runs of one decoder: for each item, a batch of prompts or a conversation, one run per round."""

    items: list[list[Decoded]] = dataclasses.field(default_factory=list)  # [item][round]

    @property
    def outputs(self) -> list[list[list[int]]]:
        """[item][row][token], of the first round."""
        return [rounds[0].tokens for rounds in self.items]

    @property
    def lengths(self) -> Counter[int]:
        """Number of steps by the number of tokens that they emitted, in the first round."""
        return Counter(length for rounds in self.items for row in rounds[0].lengths for length in row)

    @property
    def first_seconds(self) -> float:
        """Seconds until the first token, the median over items."""
        return statistics.median(_median(rounds, lambda run: run.first_seconds) for rounds in self.items)

    @property
    def peak_bytes(self) -> int | None:
        return max((run.peak_bytes for rounds in self.items for run in rounds if run.peak_bytes is not None), default=None)

    def totals(
        self,
        weights: Tensor | None = None,  # (R, items) double: how often each item counts in each resample; None: once
    ) -> Totals:
        """Sums over items; the seconds of an item are those of its median round."""
        rows = []
        for rounds in self.items:
            run = rounds[0]
            tokens = sum(map(len, run.tokens))
            seconds = _median(rounds, lambda run: run.seconds)
            decoding = _median(rounds, lambda run: run.seconds - run.prefill_seconds)
            rows.append([tokens, seconds, tokens - run.prefill_tokens, decoding, sum(map(len, run.lengths)), run.steps])
        table = torch.tensor(rows, dtype=torch.double)  # (items, 6)
        sums = table.sum(0) if weights is None else (weights @ table).T
        return Totals(*sums)

    @property
    def tokens(self) -> int:
        return int(self.totals().tokens)

    @property
    def tokens_per_second(self) -> float:
        return float(self.totals().tokens_per_second)

    @property
    def acceleration_rate(self) -> float:
        return float(self.totals().acceleration_rate)


def _median(rounds: Sequence[Decoded], figure: Callable[[Decoded], float]) -> float:
    return statistics.median(map(figure, rounds))


def overhead(measured: Totals, plain: Totals) -> Tensor:
    """Seconds of a decoding step over those of a plain one, without the prefill (paper B.1)."""
    return measured.step_seconds / plain.step_seconds


class Estimate(NamedTuple):
    """A figure and its 95 % interval; a single item has no interval."""

    value: float
    low: float | None
    high: float | None


@functools.lru_cache(maxsize=16)
def resamples(items: int) -> Tensor:  # (R, items)
    """How often each item counts in each bootstrap resample; the same for all decoders, so that ratios are paired."""
    drawn = torch.randint(items, (RESAMPLES, items), generator=torch.Generator().manual_seed(0))
    return torch.zeros(RESAMPLES, items, dtype=torch.double).scatter_add_(1, drawn, torch.ones(()).double().expand_as(drawn))


def estimate(figure: Callable[..., Tensor], *measured: Measurement) -> Estimate:
    """A figure of the totals of decoders measured on the same items, with its bootstrap interval over items."""
    value = float(figure(*(each.totals() for each in measured)))
    items = len(measured[0].items)
    if items < 2:
        return Estimate(value, None, None)
    weights = resamples(items)
    drawn = figure(*(each.totals(weights) for each in measured))
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.double)
    low, high = torch.nanquantile(drawn, tails).tolist()  # a resample without decoding has no rate
    return Estimate(value, low, high)


def time_run(decoder: Decoder, ids: Tensor) -> Decoded:
    """Decode a batch of prompts, timed end to end."""
    decoder.prepare(ids)
    cuda = torch.cuda.is_initialized()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    watched = not cuda and _reset_peak()
    start = time.perf_counter()
    decoded = decoder(ids)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else _peak() if watched else None
    return dataclasses.replace(decoded, seconds=seconds, peak_bytes=peak)


def _reset_peak() -> bool:
    """Reset the peak memory that Linux keeps for this process; False if that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak() -> int | None:
    """Peak memory of this process since the reset, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The names in order, starting with a different one each time, so that none always follows the same other."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def compare_decoders(
    decoders: dict[str, Decoder],
    batches: Sequence[Tensor],  # each (B, P) long
    rounds: int = 1,
    warmup: int = 1,
    on_progress: Callable[[], None] | None = None,
) -> dict[str, Measurement]:
    """Run every decoder on every batch of prompts, in turn within each batch, so that all see the same machine.

    Args:
        rounds: number of times each batch is decoded; the median counts.
        warmup: number of untimed runs of each decoder on the first batch.
        on_progress: called after every timed run.
    """
    results = {name: Measurement([[] for _ in batches]) for name in decoders}
    for decoder in decoders.values():
        for _ in range(warmup):
            decoder(batches[0])
    for number, batch in enumerate(batches):
        for round_ in range(rounds):
            for name in in_turn(list(decoders), number + round_):
                results[name].items[number].append(time_run(decoders[name], batch))
                if on_progress:
                    on_progress()
    return results
