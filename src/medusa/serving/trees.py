"""Which tree the rows of a step share: what the model's tree file says for their number, or what the time of steps says."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import NamedTuple

from medusa.serving.requests import Speed
from medusa.trees.dynamic import DynamicTree
from medusa.trees.files import Tree, TreeChoice
from medusa.trees.static import MedusaTree

PATIENCE = 8  # steps that another tree has to be the better one before it is used
LEAST_TRIALS = 5  # steps with a tree before its cost is known
KEPT = 256  # steps of rows whose accepted tokens count
LEAST_STEPS = 32  # of them, before acceptance is known
MARGIN = 1.03  # how many times as fast another tree has to be
SHARE = 0.01  # of the time: the most that trials of another tree may lose
PLAIN = MedusaTree([])

log = logging.getLogger("medusa.serve")
Single = MedusaTree | DynamicTree


class Kind(NamedTuple):
    """What the time of a step depends on, beside its tree."""

    rows: int
    length: int  # of the longest row, rounded up
    guided: bool  # whether a grammar has a say in the trees

    @classmethod
    def of(cls, rows: int, length: int, guided: bool = False) -> Kind:
        """The kind of a step of so many rows, the longest of which has so many tokens."""
        return cls(rows, max(256, 1 << length.bit_length()), guided)


class TreeByLoad:
    """Chooses the tree of each step. The output is the same with any.

    Args:
        tree: the model's; a `TreeChoice` names one for each number of rows, of which some may be plain decoding.
        measured: whether to time the steps, and to use what is fastest for so many rows of such a length: the file's tree for
            that number or a greater one, or plain decoding. Otherwise, the file decides.
    """

    def __init__(self, tree: Tree, measured: bool = False):
        self._tree, self._measured = tree, measured
        self.used = tree.for_batch(1)
        self._waited, self._trying = 0, False
        self._paces: dict[Kind, Pace] = {}
        self._kept: dict[tuple[Single, bool], deque[int]] = {}  # tokens of each row in the last steps, by tree and `guided`
        self._now: Kind | None = None  # the kind of the step that was chosen for

    @property
    def all(self) -> list[Single]:
        """All trees that it may choose."""
        trees = [*self._tree.trees.values()] if isinstance(self._tree, TreeChoice) else [self._tree]
        return list(dict.fromkeys(trees + [PLAIN] * self._measured))

    def candidates(self, rows: int) -> list[Single]:
        """The trees that it may choose for so many rows; the file's comes first."""
        named = self._tree.for_batch(rows)
        if not self._measured:
            return [named]
        trees = self._tree.trees if isinstance(self._tree, TreeChoice) else {}
        return list(dict.fromkeys([named, *(trees[size] for size in sorted(trees) if size > rows), PLAIN]))

    def choose(self, kind: Kind, new: bool) -> Single:
        """The tree for the next step.

        Args:
            new: no row has been stepped before, so that there is nothing to change from.
        """
        if kind != self._now and kind in self._paces:
            self._paces[kind].before = None
        self._now = kind
        wanted, trial = self._tree.for_batch(kind.rows), False
        if self._measured and len(self.candidates(kind.rows)) > 1:
            if kind not in self._paces:
                self._paces[kind] = Pace(self.candidates(kind.rows))
            wanted, trial = self._next(kind)
        self._waited = 0 if wanted == self.used else self._waited + 1
        if new or trial or self._trying or self._waited >= PATIENCE:
            self.used, self._waited = wanted, 0
        self._trying = trial
        return self.used

    def _next(self, kind: Kind) -> tuple[Single, bool]:
        """The tree for a step according to the times so far, and whether it is a trial."""
        pace = self._paces[kind]
        before = pace.best
        found = pace.next({tree: self._tokens(tree, kind.guided) for tree in pace.trees})
        if pace.best != before:
            speeds = ", ".join(f"{name(tree)} {speed:.2f}" for tree, speed in pace.speeds.items())
            log.info(
                "%d rows of up to %d tokens decode with %s: times as fast as plain decoding are %s",
                kind.rows,
                kind.length,
                name(pace.best),
                speeds,
            )
        return found

    def _tokens(self, tree: Single, guided: bool) -> float:
        """The tokens per step of a row. What is not known yet counts as if all was accepted, so that it is tried."""
        kept = self._kept.get((tree, guided), ())
        return 1.0 if tree == PLAIN else fmean([*kept, *[tree.depth + 1] * (LEAST_STEPS - len(kept))])

    def note(self, seconds: float, tokens: Iterable[int]) -> None:
        """The step that was chosen for last was made.

        Args:
            tokens: number of new tokens of each row that goes on.
        """
        if self._now in self._paces:
            self._kept.setdefault((self.used, self._now.guided), deque(maxlen=KEPT)).extend(tokens)
            self._paces[self._now].note(self.used, seconds)

    def forget(self) -> None:
        """Forget all times: steps take other times from now on."""
        self._paces = {}

    @property
    def speeds(self) -> list[Speed]:
        """What has been measured."""
        return [
            Speed(kind.rows, kind.length, len(tree), speed)
            for kind, pace in list(self._paces.items())
            for tree, speed in pace.speeds.items()
            if not kind.guided
        ]


class Pace:
    """What steps of one kind cost with each tree that they may have.

    A tree is tried for single steps, each compared with the step before it, which had the best tree: a machine that is slow for
    a while is slow for both.
    """

    def __init__(self, trees: Iterable[Single]):
        self._costs: dict[Single, deque[float]] = {tree: deque(maxlen=3 * LEAST_TRIALS) for tree in trees}  # of the best: 1
        self._since = dict.fromkeys(self._costs, 0.0)  # time since each was tried, in steps of the best tree
        self.before: float | None = None  # seconds of the step before, if it was one of the best tree
        self.trees = list(self._costs)
        self.best = self.trees[0]
        self.speeds: dict[Single, float] = {}  # tokens per second with each tree over those of plain decoding

    def note(self, tree: Single, seconds: float) -> None:
        """A step with this tree took so long."""
        if tree == self.best:
            self.before = seconds
            self._since = {other: since + 1 for other, since in self._since.items()}
        else:
            if self.before is not None and tree in self._costs:  # for some steps after a change, the tree may be another
                self._costs[tree].append(seconds / self.before)
                self._since[tree] = 0.0
            self.before = None

    def next(self, tokens: Mapping[Single, float]) -> tuple[Single, bool]:
        """The tree for the next step, and whether that is a trial of another than the best.

        Args:
            tokens: the tokens per step of a row with each tree.
        """
        others = [tree for tree in self.trees if tree != self.best]
        untried = [tree for tree in others if len(self._costs[tree]) < LEAST_TRIALS]
        if not untried:
            costs = {tree: 1.0 if tree == self.best else median(self._costs[tree]) for tree in self.trees}
            rates = {tree: tokens[tree] / cost for tree, cost in costs.items()}
            self.speeds = {tree: rate / rates[PLAIN] for tree, rate in rates.items()}
            fastest = max(rates, key=rates.__getitem__)
            if rates[fastest] > MARGIN * rates[self.best]:
                self._lead(fastest, costs[fastest])
                return self.best, False
            # What trials lose is limited, and a tree that is nearly the best is tried often: acceptance changes with the text.
            lost = {tree: costs[tree] * max(0.1, 1 - rates[tree] / rates[self.best]) for tree in others}
            untried = [tree for tree in others if SHARE / len(others) * self._since[tree] > lost[tree]]
        return (untried[0], True) if untried and self.before is not None else (self.best, False)

    def _lead(self, tree: Single, cost: float) -> None:
        """A tree is the best from now on; costs are relative to its own."""
        for costs in self._costs.values():
            relative = [each / cost for each in costs]
            costs.clear()
            costs.extend(relative)
        self._costs[self.best].extend([1 / cost] * LEAST_TRIALS)
        self._costs[tree].clear()
        self.best, self.before = tree, None


def name(tree: Single) -> str:
    """A tree in the log."""
    return "no tree" if tree == PLAIN else f"{len(tree)} nodes"
