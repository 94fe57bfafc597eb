"""Prediction: step time from the operators, acceleration from a law or a calibration, and the resulting speedup (paper G.3)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from medusa.config import HeadsKind
from medusa.errors import InvalidInput
from medusa.simulation.hardware import ELEMENT, Hardware
from medusa.simulation.operators import PAPER_BLOCK, Operator, layers, linear, memory, step_operators
from medusa.simulation.shapes import ModelShape
from medusa.trees.calibration import Calibration

CANDIDATES = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 192, 256)
MOST_BATCH = 4096

Acceleration = Callable[[int], float]  # candidates -> tokens per step


@dataclass(frozen=True)
class Setting:
    """The model and machine to simulate."""

    shape: ModelShape
    hardware: Hardware
    dtype: str = "bfloat16"
    num_heads: int = 5  # number of Medusa heads that trees use; plain decoding runs none
    own_lm_heads: bool = True  # whether each head has its own LM head
    weight_bits: int | None = None  # bits of the backbone's quantised weights, which unpack at no cost; None: the dtype's
    paper_block: bool = False  # simulate only what the paper's G.3 does: eight operators of one layer, without heads
    heads_kind: HeadsKind = "medusa"  # what the heads read besides the hidden state
    gpus: int = 1  # GPUs that share every layer and LM head (tensor parallel); each has its own copy of the heads' blocks

    def __post_init__(self) -> None:
        if self.num_heads < 0:
            raise InvalidInput(f"{self.num_heads} heads, expected at least 0")
        if self.weight_bits is not None and not 1 <= self.weight_bits <= 8 * ELEMENT[self.dtype]:
            raise InvalidInput(f"weights of {self.weight_bits} bits, expected 1 to {8 * ELEMENT[self.dtype]} for {self.dtype}")
        if self.gpus > 1 and self.hardware.link is None:
            raise InvalidInput(
                f"no link between GPUs is known for this hardware, which {self.gpus} GPUs need; use 1, or another"
            )
        if self.shape.kv_heads % self.gpus or self.shape.heads % self.gpus:
            heads = f"{self.shape.heads} heads and {self.shape.kv_heads} of keys"
            raise InvalidInput(f"{heads} cannot be shared evenly by {self.gpus} GPUs")

    @property
    def shard(self) -> ModelShape:
        """What one GPU computes."""
        shape, n = self.shape, self.gpus
        return dataclasses.replace(
            shape,
            heads=shape.heads // n,
            kv_heads=shape.kv_heads // n,
            intermediate=math.ceil(shape.intermediate / n),
            expert_intermediate=math.ceil(shape.expert_intermediate / n),
            vocabulary=math.ceil(shape.vocabulary / n),
        )

    @property
    def element(self) -> int:
        return ELEMENT[self.dtype]

    @property
    def weight_bytes(self) -> float:
        return self.element if self.weight_bits is None else self.weight_bits / 8

    def operators(self, batch: int, length: int, candidates: int) -> list[Operator]:
        """One GPU's operators of a decoding step over a tree of `candidates` nodes, the root included; 1 is plain decoding."""
        check_positive(batch=batch, length=length, candidates=candidates)
        if self.paper_block:
            block = layers(self.shard, batch, length, candidates, self.element, self.weight_bytes, count=1)
            return [operator for operator in block if operator.name.removeprefix("expert ") in PAPER_BLOCK]
        heads = min(self.num_heads, candidates - 1)  # no tree is deeper
        element, weight = self.element, self.weight_bytes
        return step_operators(self.shard, batch, length, candidates, heads, self.own_lm_heads, element, weight, self.heads_kind)

    def seconds(self, batch: int, length: int, candidates: int) -> float:
        hardware = self.hardware
        total = self._total(self.operators(batch, length, candidates))
        if self.paper_block:
            return total
        total += self._exchange(batch * candidates, batch * candidates)
        fixed = hardware.step + self.shape.layers * hardware.layer
        return max(total, fixed) if hardware.asynchronous else total + fixed

    def prefill_seconds(self, length: int) -> float:
        """Seconds to read one prompt of `length` tokens in one pass, with logits for its last token."""
        read = layers(self.shard, 1, length, length, self.element, self.weight_bytes)
        said = linear("lm_head", 1, self.shape.hidden, self.shard.vocabulary, self.element, self.element)
        return self._total([*read, said]) + self._exchange(length, 1)

    def memory(self, batch: int, length: int) -> float:
        """Bytes on all GPUs of the backbone's weights and of the keys and values of `batch` sequences."""
        return memory(self.shape, batch, length, self.element, self.weight_bytes)

    @property
    def heads_memory(self) -> float:
        """Bytes on all GPUs of the Medusa heads."""
        h = self.shape.hidden
        lm_head = h * self.shape.vocabulary if self.own_lm_heads else 0
        return self.num_heads * (self.gpus * h * h + lm_head) * self.element

    def _total(self, operators: Iterable[Operator]) -> float:
        return sum(operator.count * self.hardware.seconds(operator, self.dtype) for operator in operators)

    def _exchange(self, rows: int, scored: int) -> float:
        """Seconds in which GPUs add up their shares, twice per layer for every row, and gather the logits of scored rows.

        In a ring of n GPUs each sends (n - 1) / n of a sum's bytes twice, and of gathered ones once.
        """
        if self.gpus == 1:
            return 0.0
        assert self.hardware.link is not None
        share = (self.gpus - 1) / self.gpus / self.hardware.link * self.element
        summed = 2 * self.shape.layers * (self.hardware.launch + 2 * share * rows * self.shape.hidden)
        return summed + self.hardware.launch + share * scored * self.shape.vocabulary


@dataclass(frozen=True)
class Point:
    """A predicted setting: speedup = acceleration_rate / overhead (paper B.1)."""

    batch: int
    length: int
    candidates: int
    seconds: float
    overhead: float
    acceleration_rate: float
    speedup: float


def predict(setting: Setting, batch: int, length: int, candidates: int, acceleration: Acceleration) -> Point:
    plain = setting.seconds(batch, length, 1)
    seconds = setting.seconds(batch, length, candidates)
    rate = acceleration(candidates)
    return Point(batch, length, candidates, seconds, seconds / plain, rate, rate * plain / seconds)


def best(
    setting: Setting, batch: int, length: int, acceleration: Acceleration, candidates: Iterable[int] = CANDIDATES
) -> Point:
    """The tree size with the greatest speedup, the smallest of equals."""
    return max((predict(setting, batch, length, size, acceleration) for size in candidates), key=lambda point: point.speedup)


def stops_paying(
    setting: Setting, length: int, acceleration: Acceleration, candidates: Iterable[int] = CANDIDATES
) -> int | None:
    """The smallest batch at which no tree is faster than plain decoding; None if there is none up to 4,096."""
    sizes = tuple(candidates)
    batch = 1
    while best(setting, batch, length, acceleration, sizes).speedup > 1:
        batch *= 2
        if batch > MOST_BATCH:
            return None
    pays, stops = batch // 2, batch
    while stops - pays > 1:
        middle = (pays + stops) // 2
        if best(setting, middle, length, acceleration, sizes).speedup > 1:
            pays = middle
        else:
            stops = middle
    return stops


def log_law(candidates: int, base: float = 2.0) -> float:
    """The paper's acceleration rate, 0.477·log(candidates), of Vicuna-7B's trees; at least the root's one token (G.3).

    The paper does not state the base; 2 is the only one that agrees with its other figures (docs/simulation.md).

    >>> round(log_law(64), 2)
    2.86
    """
    return max(1.0, 0.477 * math.log(candidates, base))


def calibrated(calibration: Calibration) -> Acceleration:
    """The acceleration of the best static tree of each size, from a calibration."""
    return functools.cache(lambda candidates: calibration.expected_acceptance_length(calibration.search(candidates)))


def check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise InvalidInput(f"{name} is {value}, expected at least 1")
