"""Operators: the FLOPs and bytes of a model's matrix multiplications (paper Table 5).

Letters are the paper's: b sequences, s tokens of context each, q new tokens each, h hidden, i intermediate, n heads of
dimension d, of which n_kv hold keys and values, V tokens of vocabulary. Prefill is q = s, plain decoding q = 1, Medusa
decoding q = nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from medusa.config import HeadsKind
from medusa.simulation.shapes import ModelShape
from medusa.trees.dynamic import BEAM, RANKS

PAPER_BLOCK = ("q", "k", "v", "qk", "pv", "up", "gate", "down")  # the operators of a layer that the paper's G.3 simulates


@dataclass(frozen=True)
class Operator:
    """One operator, run `count` times in a step. FLOPs and bytes are those of one run; every operand and result counts once."""

    name: str  # q, k, v, qk, pv, o, up, gate, down, router, lm_head, heads, …; pointwise is everything else in a layer
    flops: float
    bytes: float
    rows: float = 0  # rows that meet each weight of a linear layer; of experts, the rows of one
    weights: float = 0  # elements read of a linear layer's matrices; 0 for other operators
    weight_bytes: float = 0
    dims: tuple[int, ...] = ()  # (inputs, outputs) of a linear layer, (b, n, n_kv, q, s, d) of an attention product
    count: int = 1

    @property
    def intensity(self) -> float:
        """Operational intensity in FLOPs per byte."""
        return self.flops / self.bytes


def linear(
    name: str,
    rows: float,  # b * q
    inputs: int,
    outputs: int,
    element: float = 2,  # bytes of an activation
    weight: float = 2,  # bytes of a weight
    count: int = 1,
) -> Operator:
    """A linear layer: 2·b·q·inputs·outputs FLOPs over b·q·(inputs + outputs) activations and inputs·outputs weights.

    >>> round(linear("up", 1, 6656, 17920).intensity, 3)  # every weight is read for one multiplication and one addition
    1.0
    """
    return expert_linear(name, rows, inputs, outputs, 1, 1, element, weight, count)


def expert_linear(
    name: str,
    rows: float,
    inputs: int,
    outputs: int,
    experts: int,
    chosen: int,  # experts per row
    element: float = 2,
    weight: float = 2,
    count: int = 1,
) -> Operator:
    """The linear layers of a mixture of experts as one operator, if rows choose their experts independently.

    Of E experts, of which each row chooses k, E·(1 - (1 - k/E)^rows) are read: a tree reads more of them than one token.
    """
    read = experts * (1 - (1 - chosen / experts) ** rows)
    weights = read * inputs * outputs
    weight_bytes = weights * weight
    moved = element * rows * chosen * (inputs + outputs) + weight_bytes
    flops = 2 * rows * chosen * inputs * outputs
    return Operator(name, flops, moved, rows * chosen / read, weights, weight_bytes, (inputs, outputs), count)


def attention(
    name: str,  # qk or pv: both compute and move the same
    b: int,
    s: int,
    q: int,
    n: int,
    n_kv: int,
    d: int,
    element: float = 2,
    count: int = 1,
) -> Operator:
    """QK^T or PV: 2·b·s·q·n·d FLOPs over b·n·s·q scores, b·q·n·d queries (or results) and b·s·n_kv·d keys (or values).

    >>> round(attention("qk", 16, 1024, 64, 52, 52, 128).intensity, 2)  # Table 6
    40.96
    """
    moved = element * (b * n * s * q + b * q * n * d + b * s * n_kv * d)
    return Operator(name, 2 * b * s * q * n * d, moved, dims=(b, n, n_kv, q, s, d), count=count)


def layers(
    shape: ModelShape, b: int, s: int, q: int, element: float = 2, weight: float = 2, count: int | None = None
) -> list[Operator]:
    """The operators of `count` layers of the model, or of all."""
    rows, h, d = b * q, shape.hidden, shape.head_dim
    times = shape.layers if count is None else count
    queries, keys = shape.heads * d, shape.kv_heads * d
    found = [
        linear("q", rows, h, queries, element, weight, times),
        linear("k", rows, h, keys, element, weight, times),
        linear("v", rows, h, keys, element, weight, times),
        attention("qk", b, s, q, shape.heads, shape.kv_heads, d, element, times),
        attention("pv", b, s, q, shape.heads, shape.kv_heads, d, element, times),
        linear("o", rows, queries, h, element, weight, times),
    ]
    if shape.experts:
        experts, chosen = shape.experts, shape.experts_chosen
        found.append(linear("router", rows, h, experts, element, weight, times))
        for name, inputs, outputs in _mlp(shape, shape.expert_intermediate):
            found.append(expert_linear(f"expert {name}", rows, inputs, outputs, experts, chosen, element, weight, times))
    if shape.intermediate:
        for name, inputs, outputs in _mlp(shape, shape.intermediate):
            found.append(linear(name, rows, inputs, outputs, element, weight, times))
    # A decoder layer of transformers makes further passes: two norms in float32, the rotation, the activation and its
    # product, two residual sums; the factors are bytes read and written per element, 2 or 4 at a time.
    wide = shape.intermediate + shape.expert_intermediate * shape.experts_chosen
    passes = 84 * h + 28 * (queries + keys) + 10 * wide
    found.append(Operator("pointwise", 0, rows * passes * element / 2, count=times))
    return found


def _mlp(shape: ModelShape, width: int) -> list[tuple[str, int, int]]:
    gate = [("gate", shape.hidden, width)] if shape.gated else []
    return [("up", shape.hidden, width), *gate, ("down", width, shape.hidden)]


def step_operators(
    shape: ModelShape,
    b: int,
    s: int,
    q: int,
    num_heads: int = 0,
    own_lm_heads: bool = True,
    element: float = 2,
    weight: float = 2,
    heads_kind: HeadsKind = "medusa",
) -> list[Operator]:
    """The operators of a decoding step: the layers and the LM head on b·q rows, the Medusa heads on b rows.

    Args:
        num_heads: number of Medusa heads, of one block each.
        own_lm_heads: whether every Medusa head has its own LM head (v0.1) instead of the backbone's.
        weight: bytes per weight of the layers; quantised models keep their LM head in the activations' type.
        heads_kind: what the heads read; path heads score RANKS guesses of each depth again along the BEAM likeliest paths.
    """
    h, vocabulary = shape.hidden, shape.vocabulary
    found = layers(shape, b, s, q, element, weight)
    found.append(linear("lm_head", b * q, h, vocabulary, element, element))
    # Logits are written in the model's type, read into float32, and searched for the greatest.
    found.append(Operator("pointwise", 0, b * (q + num_heads) * vocabulary * (element + 8)))
    if num_heads:
        found.append(linear("head blocks", b, h, h, element, element, count=num_heads))
        if own_lm_heads:
            found.append(linear("head logits", b, h, vocabulary, element, element, count=num_heads))
        else:  # read once for all heads
            found.append(linear("head logits", b * num_heads, h, vocabulary, element, element))
        if heads_kind != "medusa":
            found.append(linear("head root", b, h, h, element, element, count=num_heads))
    if heads_kind == "path":
        width = min(q - 1, BEAM)
        for k in range(1, num_heads):
            found.append(linear("head path", b * width, k * h, h, element, element))
            found.append(Operator("shortlist", 2 * b * width * RANKS * h, element * b * (RANKS + width) * h))
    return found


def memory(shape: ModelShape, b: int, s: int, element: float = 2, weight: float = 2) -> float:
    """Bytes of the backbone's weights and of the keys and values of b sequences of s tokens."""
    per_layer = [operator for operator in layers(shape, 1, 1, 1, element, weight, count=1) if operator.weights]
    # All experts are in memory, however few of them one row reads.
    held = sum(
        o.weight_bytes * (shape.experts / shape.experts_chosen if o.name.startswith("expert ") else 1) for o in per_layer
    )
    tables = 2 * shape.hidden * shape.vocabulary * element
    cache = 2 * b * s * shape.kv_heads * shape.head_dim * element
    return shape.layers * (held + cache) + tables
