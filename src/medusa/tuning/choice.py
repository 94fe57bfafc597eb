"""Tuning: the kind, size and depth of tree that give this model the most tokens a second on this machine.

What a tree accepts is replayed on recorded texts, what its step costs is measured here, and the quotient decides. Where no tree
pays, the root alone, plain decoding, is chosen.

Replay is cheap, timing is not. So trees of every kind, size and depth are replayed, and a few are timed: of each kind three
sizes with one head and with all. A step's time is nearly linear in the nodes and in the heads; a plane fitted to these times
predicts the most promising depth of every kind and size. The tree of that depth is timed itself; of the fastest, all depths.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa.errors import InvalidInput
from medusa.metrics import expected_acceptance_length
from medusa.model import MedusaModel
from medusa.trees.dynamic import DynamicTree
from medusa.trees.search import search_tree
from medusa.trees.static import MedusaTree
from medusa.tuning.recording import Calibration, Recorded
from medusa.tuning.replay import fit_dynamic_tree, fit_static_tree, replay

KINDS = ("static", "dynamic", "copying", "independent")
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
STEPS = 12  # timed in a round
WORTH = 1.02  # a tree that promises less than this beside plain decoding is not worth its risk


@dataclasses.dataclass(frozen=True)
class Option:
    """A tree that may be chosen, and what it promises.

    Attributes:
        kind: static, dynamic, copying (dynamic, half of its nodes copied), independent (the paper's static search) or plain.
        acceleration_rate: tokens a step, cross-validated: each half of the texts with a tree of the other half.
        interval: its 95 % interval over texts.
        if_independent: tokens a step expected of a static tree from single accuracies, the paper's way (2.3.3).
        step_seconds: by batch size, of a decoding step here.
    """

    kind: str
    tree: MedusaTree | DynamicTree
    acceleration_rate: float
    interval: tuple[float, float]
    if_independent: float | None = None
    step_seconds: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return "plain" if self.kind == "plain" else f"{self.kind} {len(self.tree)}, depth {self.tree.depth}"

    def tokens_per_second(self, batch: int) -> float:
        """Of all rows of a batch together, the prefill left out."""
        return batch * self.acceleration_rate / self.step_seconds[batch]


def copied_nodes(kind: str, size: int) -> int:
    """How many nodes of a tree of a kind and size are copied."""
    return size // 2 if kind == "copying" and size > 3 else 0


class Trees:
    """The best trees of every kind and size for recorded texts, and what they accept.

    Raises:
        InvalidInput: there is but one text.
    """

    def __init__(self, texts: Sequence[Recorded]):
        if len(texts) < 2:
            raise InvalidInput("one text cannot both choose trees and judge them; give more prompts")
        self._halves = [list(texts), list(texts[::2]), list(texts[1::2])]  # the first: all of them
        self._calibrations = [Calibration.of(half) for half in self._halves]
        self._options: dict[tuple[str, int, int], Option] = {}

    @property
    def heads(self) -> int:
        return len(self._calibrations[0].hits)

    @functools.cached_property
    def _dynamic(self) -> list[DynamicTree]:
        return [fit_dynamic_tree(half) for half in self._halves]

    def tree(self, kind: str, size: int, depth: int, half: int = 0) -> MedusaTree | DynamicTree:
        """The best tree of a kind: on all texts (half 0), or on one of the halves."""
        if kind in ("dynamic", "copying"):
            return dataclasses.replace(self._dynamic[half], num_nodes=size, depth=depth, copied=copied_nodes(kind, size))
        if kind == "independent":
            return search_tree(self._calibrations[half].accuracies[:depth], size)
        return fit_static_tree(self._halves[half], size, depth)

    def depths(self, kind: str, size: int) -> range:
        """The numbers of heads that a tree of a kind and size can use: each head needs a node."""
        return range(1, max(1, min(self.heads, size - copied_nodes(kind, size) - 1)) + 1)

    def option(self, kind: str, size: int, depth: int | None = None) -> Option:
        """A tree with what it accepts, where each half of the texts judges a tree chosen on the other.

        Args:
            depth: number of heads; None is all that a tree of this size can use.
        """
        key = kind, size, depth or self.depths(kind, size)[-1]
        if key not in self._options:
            self._options[key] = self._option(*key)
        return self._options[key]

    def _option(self, kind: str, size: int, depth: int) -> Option:
        judged = [replay(self._halves[3 - half], self.tree(kind, size, depth, half)) for half in (1, 2)]
        both = dataclasses.replace(
            judged[0],
            tokens=torch.cat([each.tokens for each in judged]),
            steps=torch.cat([each.steps for each in judged]),
            began=[row for each in judged for row in each.began],
        )
        tree, expected = self.tree(kind, size, depth), None
        if isinstance(tree, MedusaTree):
            expected = expected_acceptance_length(tree, self._calibrations[0].accuracies)
        return Option(kind, tree, both.acceleration_rate, both.interval(), expected)


PLAIN = Option("plain", MedusaTree([]), 1.0, (1.0, 1.0))


def measure_steps(
    model: MedusaModel,
    trees: Sequence[MedusaTree | DynamicTree],
    prompts: Tensor,  # (B, P) long
    steps: int = STEPS,
    rounds: int = 5,
    on_progress: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[float]:
    """Seconds of a decoding step with each tree.

    Trees take turns in rounds. What counts is the median over rounds of a tree's ratio to the first tree in the same round, and
    the first one's own median: a machine that is slow for a while is slow for all.

    Args:
        options: of `MedusaModel.stream`, such as `compile`.
    """
    seconds: list[list[float]] = [[] for _ in trees]
    limit = room_to_time(max(tree.depth for tree in trees), max(tree.drafter().depth for tree in trees), steps)
    for round_ in range(rounds + 1):  # the first is to warm up: compilers and caches
        for turn in range(len(trees)):
            number = (turn + round_) % len(trees)
            taken: list[float] = []
            while len(taken) < steps:  # a tree that accepts much comes to the end of its stream before
                greedy = {"do_sample": False, "eos_token_id": [], **options}
                stream = model.stream(prompts, torch.ones_like(prompts), max_new_tokens=limit, tree=trees[number], **greedy)
                run = [step.seconds for step in itertools.islice(stream, steps - len(taken) + 2)]
                taken += run[1:-1]  # the first has the prefill, and the last of a stream may verify nothing
            if round_:
                seconds[number].append(statistics.median(taken))
            on_progress()
    first = statistics.median(seconds[0])
    return [first * statistics.median(a / b for a, b in zip(each, seconds[0], strict=True)) for each in seconds]


def room_to_time(heads: int, deepest: int, steps: int = STEPS) -> int:
    """Tokens that timing may emit after a prompt, the same for all trees: room for all steps with the heads alone, and for
    three of the deepest tree, whose path may be copied."""
    return max((steps + 2) * (heads + 1), 3 * (deepest + 1))


def choose(options: Sequence[Option], plain: Option, batch: int) -> Option:
    """The option with the most tokens a second; plain decoding where none is clearly faster.

    >>> fast = Option("static", MedusaTree.dense([2]), 1.5, (1.4, 1.6), None, {1: 0.011})
    >>> slow = Option("static", MedusaTree.dense([8]), 1.9, (1.8, 2.0), None, {1: 0.02})
    >>> choose([fast, slow], dataclasses.replace(PLAIN, step_seconds={1: 0.010}), 1).name
    'static 3, depth 1'
    >>> choose([fast, slow], dataclasses.replace(PLAIN, step_seconds={1: 0.007}), 1).name
    'plain'
    """
    best = max(options, key=lambda option: option.tokens_per_second(batch))
    return best if best.tokens_per_second(batch) >= WORTH * plain.tokens_per_second(batch) else plain


Measure = Callable[[Sequence[MedusaTree | DynamicTree], int], list[float]]  # trees, batch -> seconds of a step with each


@dataclasses.dataclass(frozen=True)
class Tuned:
    """All that was tried, and what was chosen by batch size.

    Attributes:
        by_depth: for the choice of the smallest batch, the same kind and size with 1, 2, … heads: what each head adds.
    """

    plain: Option
    options: list[Option]
    by_depth: list[Option]
    chosen: dict[int, Option]

    @property
    def recommended_heads(self) -> int:
        """K with the most tokens a second (paper 2.2.3); 0 where plain decoding was chosen."""
        return self.chosen[min(self.chosen)].tree.depth

    def to_dict(self) -> dict[str, Any]:
        def told(option: Option) -> dict[str, Any]:
            found = {
                "kind": option.kind,
                "nodes": len(option.tree),
                "depth": option.tree.depth,
                "acceleration_rate": option.acceleration_rate,
                "interval": list(option.interval),
                "if_independent": option.if_independent,
            }
            by_batch = {
                str(batch): {
                    "step_seconds": seconds,
                    "overhead": seconds / self.plain.step_seconds[batch],
                    "speedup": option.tokens_per_second(batch) / self.plain.tokens_per_second(batch),
                }
                for batch, seconds in option.step_seconds.items()
            }
            return {**found, "batches": by_batch}

        return {
            "plain": told(self.plain),
            "options": [told(option) for option in self.options],
            "by_depth": [told(option) for option in self.by_depth],
            "chosen": {str(batch): told(option) for batch, option in self.chosen.items()},
            "recommended_heads": self.recommended_heads,
        }


def tune(
    trees: Trees,
    measure: Measure,
    kinds: Sequence[str] = KINDS[:3],
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = (1,),
    always: bool = False,
) -> Tuned:
    """Try every kind and size at its most promising depth, then all depths of the best; choose for each batch size.

    Args:
        measure: what a step costs here; the plain one is measured beside the others each time.
        always: choose a tree even where plain decoding is faster.
    """
    options = _different([each for kind in kinds for each in promising(trees, measure, kind, sizes, batches)])
    plain, *options = _timed([PLAIN, *options], measure, batches)
    chosen = {batch: _choose(options, plain, batch, always) for batch in batches}
    smallest = min(batches)
    first, by_depth = chosen[smallest], []
    if first.kind != "plain":
        size = len(first.tree)
        tried = [trees.option(first.kind, size, depth) for depth in trees.depths(first.kind, size)]
        again, *by_depth = _timed([PLAIN, *_different(tried)], measure, [smallest])
        by_depth = [_beside(option, again, plain, smallest) for option in by_depth]
        chosen[smallest] = _choose(by_depth, plain, smallest, always)
    return Tuned(plain, options, by_depth, chosen)


def promising(trees: Trees, measure: Measure, kind: str, sizes: Sequence[int], batches: Sequence[int]) -> list[Option]:
    """For every size of tree of a kind the depth that should give the most tokens a second: one option, or one per batch size.

    Step times are those of a plane over nodes and heads, fitted to the smallest, the middle and the largest size, each with one
    head and with all, measured beside plain decoding.
    """
    ordered = sorted(sizes)
    corners = [
        trees.option(kind, size, depth)
        for size in dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1]))
        for depth in dict.fromkeys((1, trees.depths(kind, size)[-1]))
    ]
    timed = _timed([PLAIN, *_different(corners)], measure, batches)
    found = []
    for batch in batches:
        predict = step_plane(timed, batch)
        for size in ordered:
            tried = [trees.option(kind, size, depth) for depth in trees.depths(kind, size)]
            found.append(max(tried, key=lambda option: option.acceleration_rate / predict(option.tree)))  # of equals the first
    return _different(found)


def step_plane(timed: Sequence[Option], batch: int) -> Callable[[MedusaTree | DynamicTree], float]:
    """Seconds of a step with any tree of a kind, from those of a few: a + b nodes + c heads + d nodes heads, least squares.

    Args:
        timed: measured options, the plain one first; no tree is predicted to be faster than it, nor slower for fewer heads.
    """

    def terms(tree: MedusaTree | DynamicTree) -> list[float]:
        nodes, heads = len(tree) - 1, tree.depth
        return [nodes, heads, nodes * heads]

    plain = timed[0].step_seconds[batch]
    rows = np.array([terms(option.tree) for option in timed[1:]], dtype=float)
    above = np.array([option.step_seconds[batch] - plain for option in timed[1:]])
    factors = np.linalg.lstsq(rows, above, rcond=None)[0]
    return lambda tree: plain + max(0.0, float(np.dot(terms(tree), factors)))


def _choose(options: Sequence[Option], plain: Option, batch: int, always: bool) -> Option:
    return max(options, key=lambda option: option.tokens_per_second(batch)) if always else choose(options, plain, batch)


def _different(options: Sequence[Option]) -> list[Option]:
    """Where few paths came true, several sizes or depths are one tree."""
    return list({option.tree: option for option in reversed(options)}.values())[::-1]


def _timed(options: Sequence[Option], measure: Measure, batches: Sequence[int]) -> list[Option]:
    """The options with the seconds of their steps, the plain one first: a step that does more is not taken to be faster."""
    seconds = {batch: measure([option.tree for option in options], batch) for batch in batches}
    return [
        dataclasses.replace(option, step_seconds={b: max(times[number], times[0]) for b, times in seconds.items()})
        for number, option in enumerate(options)
    ]


def _beside(option: Option, its_plain: Option, plain: Option, batch: int) -> Option:
    """An option timed beside another plain step, on the scale of this one."""
    overhead = option.step_seconds[batch] / its_plain.step_seconds[batch]
    return dataclasses.replace(option, step_seconds={batch: overhead * plain.step_seconds[batch]})
