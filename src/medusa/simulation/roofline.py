"""Roofline: operators as points of FLOP/s against operational intensity (paper G.1, G.2, Tables 6-8)."""

from __future__ import annotations

from dataclasses import dataclass

from medusa.errors import InvalidInput
from medusa.simulation.hardware import ELEMENT, Hardware
from medusa.simulation.operators import Operator, attention, layers, linear
from medusa.simulation.prediction import check_positive
from medusa.simulation.shapes import BUILT_IN, ModelShape

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
PAPER_CANDIDATES = (1, 16, 32, 48, 64, 80, 96, 112)
KINDS = {"qkv": ("q", "k", "v"), "qk/pv": ("qk", "pv"), "up/gate/down": ("up", "gate", "down")}
OPERATOR_KINDS = {operator: kind for kind, operators in KINDS.items() for operator in operators}
PAPER_TABLES = (6, 7, 8)


@dataclass(frozen=True)
class RooflinePoint:
    """An operator in a setting: the greatest FLOP/s that the roofline allows, and those that the fitted model predicts."""

    operator: str
    phase: str  # prefill, decoding or medusa
    batch: int
    length: int
    candidates: int
    intensity: float
    attainable: float
    predicted: float


def place(operator: Operator, hardware: Hardware, dtype: str, phase: str, batch: int, length: int, q: int) -> RooflinePoint:
    return RooflinePoint(
        operator.name,
        phase,
        batch,
        length,
        q,
        operator.intensity,
        hardware.attainable(operator.intensity, dtype),
        operator.flops / hardware.seconds(operator, dtype),
    )


def points(
    shape: ModelShape, hardware: Hardware, batch: int, length: int, candidates: int = 1, dtype: str = "bfloat16"
) -> list[RooflinePoint]:
    """The operators of a layer in prefill of `length` tokens, decoding, and with `candidates` > 1 Medusa decoding."""
    check_positive(batch=batch, length=length, candidates=candidates)
    phases = [("prefill", length), ("decoding", 1)] + ([("medusa", candidates)] if candidates > 1 else [])
    return [
        place(operator, hardware, dtype, phase, batch, length, q)
        for phase, q in phases
        for operator in layers(shape, batch, length, q, ELEMENT[dtype], ELEMENT[dtype])
        if operator.flops
    ]


def scatter(shape: ModelShape, hardware: Hardware, dtype: str = "bfloat16") -> list[RooflinePoint]:
    """Figures 9-17: the three kinds of operator, prefill and decoding, in 49 settings of batch and length."""
    every = (p for b in BATCHES for s in LENGTHS for p in points(shape, hardware, b, s, dtype=dtype))
    return [point for point in every if point.operator in OPERATOR_KINDS]


def paper_table(number: int, hardware: Hardware, shape: ModelShape = BUILT_IN["llama-33b"]) -> list[RooflinePoint]:
    """The cells of the paper's Table 6, 7 or 8, row by row, for any hardware and shape; Figures 18-20 draw them.

    Table 6 is an attention product at batch 16 over lengths, Table 7 one at length 1024 over batches, Table 8 a linear layer of
    the MLP over batches.
    """
    if number not in PAPER_TABLES:
        raise InvalidInput(f"paper table {number}, expected one of {', '.join(map(str, PAPER_TABLES))}")
    settings = [(16, s) for s in LENGTHS] if number == 6 else [(b, 1024) for b in BATCHES]
    found = []
    for b, s in settings:
        for q in PAPER_CANDIDATES:
            if number == 8:
                operator = linear("up", b * q, shape.hidden, shape.intermediate or shape.expert_intermediate)
            else:
                operator = attention("qk", b, s, q, shape.heads, shape.kv_heads, shape.head_dim)
            found.append(place(operator, hardware, "bfloat16", "medusa" if q > 1 else "decoding", b, s, q))
    return found
