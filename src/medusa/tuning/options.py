"""Options: the best tree of every kind, size and depth for recorded texts, and the tokens per step of each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch

from medusa.errors import InvalidInput
from medusa.metrics import expected_acceptance_length
from medusa.runs.console import progress
from medusa.trees.calibration import Calibration
from medusa.trees.dynamic import DynamicTree
from medusa.trees.search import search_tree
from medusa.trees.static import MedusaTree
from medusa.tuning.recording import Recorded
from medusa.tuning.replay import fit_dynamic_tree, fit_static_tree, replay_texts


@dataclasses.dataclass(frozen=True)
class Option:
    """A tree that may be chosen, and its expected speed."""

    kind: str  # of TREE_KINDS, or plain
    tree: MedusaTree | DynamicTree
    acceleration_rate: float  # tokens per step, cross-validated: each half of the texts with a tree fitted to the other half
    interval: tuple[float, float]  # 95 % interval of the acceleration rate over texts
    if_independent: float | None = None  # tokens per step of a static tree if heads erred independently (paper 2.3.3)
    # Seconds of a decoding step on this machine, by batch size.
    step_seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return "plain" if self.kind == "plain" else f"{self.kind} {len(self.tree)}, depth {self.tree.depth}"

    def tokens_per_second(self, batch: int) -> float:
        """New tokens per second of a whole batch, without the prefill."""
        return batch * self.acceleration_rate / self.step_seconds[batch]

    def overhead(self, plain: Option, batch: int) -> float:
        return self.step_seconds[batch] / plain.step_seconds[batch]

    def speedup(self, plain: Option, batch: int) -> float:
        """Tokens per second over those of plain decoding."""
        return self.tokens_per_second(batch) / plain.tokens_per_second(batch)


PLAIN = Option("plain", MedusaTree([]), 1.0, (1.0, 1.0))


def copied_nodes(kind: str, size: int) -> int:
    return size // 2 if kind == "copying" and size > 3 else 0


class Trees:
    """The best trees for recorded texts, at least two; each is searched for when first needed."""

    def __init__(self, texts: Sequence[Recorded]):
        if len(texts) < 2:
            raise InvalidInput("there is one text, expected at least two: one to choose trees, one to evaluate them")
        self._halves = [list(texts), list(texts[::2]), list(texts[1::2])]  # the first is all of them
        self._calibrations = [Calibration.of(half) for half in self._halves]
        self._options: dict[tuple[str, int, int], Option] = {}

    @functools.cached_property
    def _dynamic(self) -> list[DynamicTree]:
        return [fit_dynamic_tree(half) for half in self._halves]

    def depths(self, kind: str, size: int) -> range:
        """The numbers of heads that a tree of this kind and size can use: each head needs a node."""
        return range(1, max(1, min(len(self._calibrations[0].hits), size - copied_nodes(kind, size) - 1)) + 1)

    def search(self, kinds: Sequence[str], sizes: Sequence[int]) -> None:
        """Search the trees of all these kinds and sizes at every depth."""
        with progress("searching trees", len(kinds) * len(sizes), "sizes") as bar:
            for kind, size in itertools.product(kinds, sizes):
                for depth in self.depths(kind, size):
                    self.option(kind, size, depth)
                bar.update()

    def option(self, kind: str, size: int, depth: int | None = None) -> Option:
        """The best tree of this kind, size and depth, fitted to all texts; its rate is that of trees fitted to halves.

        Args:
            depth: number of heads; None is all that a tree of this size can use.
        """
        key = kind, size, depth or self.depths(kind, size)[-1]
        if key not in self._options:
            self._options[key] = self._option(*key)
        return self._options[key]

    def _option(self, kind: str, size: int, depth: int) -> Option:
        judged = [replay_texts(self._halves[3 - half], self._tree(kind, size, depth, half)) for half in (1, 2)]
        both = dataclasses.replace(
            judged[0],
            tokens=torch.cat([each.tokens for each in judged]),
            steps=torch.cat([each.steps for each in judged]),
            began=[row for each in judged for row in each.began],
        )
        tree, expected = self._tree(kind, size, depth, 0), None
        if isinstance(tree, MedusaTree):
            expected = expected_acceptance_length(tree, self._calibrations[0].accuracies)
        return Option(kind, tree, both.acceleration_rate, both.interval(), expected)

    def _tree(self, kind: str, size: int, depth: int, half: int) -> MedusaTree | DynamicTree:
        """The best tree fitted to one of the halves, 1 or 2, or to all texts, 0."""
        if kind in ("dynamic", "copying"):
            return dataclasses.replace(self._dynamic[half], num_nodes=size, depth=depth, copied=copied_nodes(kind, size))
        if kind == "independent":
            return search_tree(self._calibrations[half].accuracies[:depth], size)
        return fit_static_tree(self._halves[half], size, depth)


def different(options: Sequence[Option]) -> list[Option]:
    """Options without repeated trees: if few paths came true, several sizes or depths have the same tree."""
    return list({option.tree: option for option in reversed(options)}.values())[::-1]
