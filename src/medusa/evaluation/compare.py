"""Comparing decoders: the same prompts, interleaved in one run, end to end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medusa.model import MedusaModel
from medusa.tree import MedusaTree


@dataclass(frozen=True)
class Decoded:
    """One decoded batch."""

    tokens: list[list[int]]  # per row, the new tokens
    steps: int | None = None  # decoding steps; None where the decoder does not say
    row_steps: int | None = None  # the steps that rows took part in, summed over rows
    step_seconds: float = 0.0  # of the steps after the first, which has the prefill


Decoder = Callable[[Tensor], Decoded]  # of prompts (B, P)


@dataclass
class Measurement:
    """What one decoder did: outputs, and per batch of prompts the seconds of every round."""

    outputs: list[list[list[int]]] = field(default_factory=list)  # [batch][row][token]
    seconds: list[list[float]] = field(default_factory=list)  # [batch][round]
    steps: int = 0
    row_steps: int = 0
    step_seconds: list[float] = field(default_factory=list)  # per batch and round, the mean of a step

    @property
    def tokens(self) -> int:
        return sum(len(row) for rows in self.outputs for row in rows)

    @property
    def total_seconds(self) -> float:
        return sum(statistics.median(rounds) for rounds in self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over end-to-end seconds, prefill included; per batch the median over rounds."""
        return self.tokens / self.total_seconds

    @property
    def acceleration_rate(self) -> float:
        """Tokens per decoding step and row (paper B.1)."""
        return self.tokens / self.row_steps


def transformers_decoder(model: MedusaModel, max_new_tokens: int, **sampling) -> Decoder:
    """transformers' own `generate` on the same backbone, with the same limits."""
    pad = model.backbone.generation_config.pad_token_id or 0

    def decode(ids: Tensor) -> Decoded:
        output = model.backbone.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **({"do_sample": False} | sampling),
        )
        eos = set(model.eos_token_ids)
        rows = []
        for row in output[:, ids.shape[1] :].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
            rows.append(row[:end])
        return Decoded(rows)

    return decode


def medusa_decoder(model: MedusaModel, max_new_tokens: int, tree: MedusaTree | None = None, **options) -> Decoder:
    """Our loop: plain with the root-only tree, Medusa with any other."""

    def decode(ids: Tensor) -> Decoded:
        rows: list[list[int]] = [[] for _ in ids]
        steps, row_steps, later = 0, 0, []
        for step in model.stream(ids, max_new_tokens=max_new_tokens, tree=tree, **options):
            if steps:
                later.append(step.seconds)
            steps += 1
            for row, tokens in zip(rows, step.tokens, strict=True):
                row += tokens
                row_steps += bool(tokens)
        return Decoded(rows, steps, row_steps, statistics.fmean(later) if later else 0.0)

    return decode


def compare(
    decoders: dict[str, Decoder],
    batches: Sequence[Tensor],  # each (B, P) long
    rounds: int = 1,
    warmup: int = 1,
    on_progress: Callable[[], None] | None = None,
) -> dict[str, Measurement]:
    """Run every decoder on every batch of prompts, in turn within each batch, so that all see the same machine.

    Args:
        rounds: times each batch is decoded; the median counts.
        warmup: untimed runs of each decoder on the first batch.
        on_progress: called after every timed run.
    """
    results = {name: Measurement() for name in decoders}
    for decoder in decoders.values():
        for _ in range(warmup):
            decoder(batches[0])
    names = list(decoders)
    for number, batch in enumerate(batches):
        for name in names:
            results[name].seconds.append([])
        for round_ in range(rounds):
            # A different one begins each time: none is always the first after another's cache traffic.
            turn = (number + round_) % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.perf_counter()
                decoded = decoders[name](batch)
                if batch.is_cuda:
                    torch.cuda.synchronize()
                measured = results[name]
                measured.seconds[-1].append(time.perf_counter() - start)
                measured.step_seconds.append(decoded.step_seconds)
                if round_ == 0:
                    measured.outputs.append(decoded.tokens)
                    measured.steps += decoded.steps or 0
                    measured.row_steps += decoded.row_steps or 0
                if on_progress:
                    on_progress()
    return results


def repeated_ngrams(tokens: Sequence[int], n: int = 8) -> float:
    """The share of n-grams that occurred before in the sequence: how much a model repeats itself.

    >>> repeated_ngrams([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def overhead(measured: Measurement, plain: Measurement) -> float:
    """Time of a decoding step over that of a plain one, the prefill left out (paper B.1)."""
    return statistics.median(measured.step_seconds) / statistics.median(plain.step_seconds)
