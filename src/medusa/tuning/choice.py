"""Choice: the kind, size and depth of tree with the most tokens per second on this machine.

Tokens per step come from replaying trees on recorded texts, seconds per step from timing; the quotient decides. If no tree pays
off, plain decoding (a tree of the root alone) is chosen.

Replay is cheap, timing is not. So trees of every kind, size and depth are replayed, but only a few are timed: three sizes of
one kind, each with one head and with all heads. The time of a step is nearly linear in nodes and heads, so a plane fitted to
these times predicts the best depth of every kind and size. That tree is then timed, and so is the fastest one at all depths.
Where every tree has to be compiled first, for half a minute, only sizes that are predicted to come near the fastest are timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medusa.trees.dynamic import DynamicTree
from medusa.trees.static import MedusaTree
from medusa.tuning.config import SIZES, USUAL_KINDS
from medusa.tuning.options import PLAIN, Option, Trees, different

LEAST_SPEEDUP = 1.02  # below this, a tree is not worth the risk that the prediction is wrong
NEAR = 1.15  # a size predicted to be slower than the fastest by more than this factor is not worth compiling

# Seconds of a step with each tree, for a batch size.
StepTimer = Callable[[Sequence[MedusaTree | DynamicTree], int], list[float]]


@dataclasses.dataclass(frozen=True)
class Choices:
    """All options that were timed, and the choice for each batch size."""

    plain: Option
    options: list[Option]
    by_depth: list[Option]  # the choice for the smallest batch with 1, 2, … heads: what each head adds
    chosen: dict[int, Option]

    @property
    def recommended_heads(self) -> int:
        """The number of heads with the most tokens per second (paper 2.2.3); 0 if plain decoding was chosen."""
        return self.chosen[min(self.chosen)].tree.depth

    def to_dict(self) -> dict[str, Any]:
        return {
            "plain": self._described(self.plain),
            "options": list(map(self._described, self.options)),
            "by_depth": list(map(self._described, self.by_depth)),
            "chosen": {str(batch): self._described(option) for batch, option in self.chosen.items()},
            "recommended_heads": self.recommended_heads,
        }

    def _described(self, option: Option) -> dict[str, Any]:
        plain = self.plain
        by_batch = {
            str(batch): {
                "step_seconds": seconds,
                "overhead": option.overhead(plain, batch),
                "speedup": option.speedup(plain, batch),
            }
            for batch, seconds in option.step_seconds.items()
        }
        return {
            "kind": option.kind,
            "nodes": len(option.tree),
            "depth": option.tree.depth,
            "acceleration_rate": option.acceleration_rate,
            "interval": list(option.interval),
            "if_independent": option.if_independent,
            "batches": by_batch,
        }


def choose_trees(
    trees: Trees,
    timer: StepTimer,  # measures steps here; plain decoding is timed next to the others every time
    kinds: Sequence[str] = USUAL_KINDS,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = (1,),
    always: bool = False,  # choose a tree even if plain decoding is faster
    slower: float = math.inf,  # leave out sizes predicted to be slower than the fastest by more than this factor
) -> Choices:
    """Time every kind and size at its most promising depth, then the best at all depths; choose for each batch size."""
    plain, *options = _timed([PLAIN, *promising(trees, timer, kinds, sizes, batches, slower)], timer, batches)
    chosen = {batch: choose(options, plain, batch, always) for batch in batches}
    smallest = min(batches)
    first, by_depth = chosen[smallest], []
    if first.kind != "plain":
        size = len(first.tree)
        tried = [trees.option(first.kind, size, depth) for depth in trees.depths(first.kind, size)]
        again, *by_depth = _timed([PLAIN, *different(tried)], timer, [smallest])
        for option in by_depth:  # timed in another run: rescaled so that its plain step takes as long
            option.step_seconds[smallest] *= plain.step_seconds[smallest] / again.step_seconds[smallest]
        chosen[smallest] = choose(by_depth, plain, smallest, always)
        latest = {option.tree: option.step_seconds[smallest] for option in by_depth}
        for option in options:
            option.step_seconds[smallest] = latest.get(option.tree, option.step_seconds[smallest])
    return Choices(plain, options, by_depth, chosen)


def choose(options: Sequence[Option], plain: Option, batch: int, always: bool = False) -> Option:
    """The option with the most tokens per second; plain decoding if none is clearly faster, unless `always`.

    >>> fast = Option("static", MedusaTree.dense([2]), 1.5, (1.4, 1.6), None, {1: 0.011})
    >>> slow = Option("static", MedusaTree.dense([8]), 1.9, (1.8, 2.0), None, {1: 0.02})
    >>> choose([fast, slow], dataclasses.replace(PLAIN, step_seconds={1: 0.010}), 1).name
    'static 3, depth 1'
    >>> choose([fast, slow], dataclasses.replace(PLAIN, step_seconds={1: 0.007}), 1).name
    'plain'
    """
    best = max(options, key=lambda option: option.tokens_per_second(batch))
    return best if always or best.speedup(plain, batch) >= LEAST_SPEEDUP else plain


def promising(
    trees: Trees, timer: StepTimer, kinds: Sequence[str], sizes: Sequence[int], batches: Sequence[int], slower: float
) -> list[Option]:
    """For every kind and size, the depth with the most tokens per second according to a plane of step times.

    The plane is fitted to the smallest, the middle and the largest size of the first kind, each with one head and with all.
    The best depth may differ between batch sizes; a size then has several options.
    """
    ordered = sorted(sizes)
    corners = [
        trees.option(kinds[0], size, depth)
        for size in dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1]))
        for depth in dict.fromkeys((1, trees.depths(kinds[0], size)[-1]))
    ]
    timed = _timed([PLAIN, *different(corners)], timer, batches)
    found = []
    for batch in batches:
        predict = step_plane(timed, batch)
        best = []  # (speed, option) of every kind and size, the shallowest of equals
        for kind, size in itertools.product(kinds, ordered):
            tried = [trees.option(kind, size, depth) for depth in trees.depths(kind, size)]
            speeds = [option.acceleration_rate / predict(option.tree) for option in tried]
            best.append((max(speeds), tried[speeds.index(max(speeds))]))
        fastest = max(speed for speed, _ in best)
        found += [option for speed, option in best if slower * speed >= fastest]
    return different(found)


def step_plane(timed: Sequence[Option], batch: int) -> Callable[[MedusaTree | DynamicTree], float]:
    """Predicted seconds of a step: plain + a nodes + b heads, fitted by least squares to plain decoding, which comes first, and
    trees."""

    def terms(tree: MedusaTree | DynamicTree) -> list[float]:
        return [len(tree) - 1, tree.depth]

    plain = timed[0].step_seconds[batch]
    rows = np.array([terms(option.tree) for option in timed[1:]], dtype=float)
    above = np.array([option.step_seconds[batch] - plain for option in timed[1:]])
    factors = np.linalg.lstsq(rows, above, rcond=None)[0]
    return lambda tree: plain + max(0.0, float(np.dot(terms(tree), factors)))


def _timed(options: Sequence[Option], timer: StepTimer, batches: Sequence[int]) -> list[Option]:
    """The options with their step times, plain decoding first; no tree counts as faster than plain, which does less."""
    seconds = {batch: timer([option.tree for option in options], batch) for batch in batches}
    return [
        dataclasses.replace(option, step_seconds={b: max(times[number], times[0]) for b, times in seconds.items()})
        for number, option in enumerate(options)
    ]
