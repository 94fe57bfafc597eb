"""Which tree the rows of a step share: what the model's tree file says for their number, or what the time of steps says."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean, median_low
from typing import NamedTuple

from medusa.serving.requests import Speed
from medusa.trees.dynamic import DynamicTree
from medusa.trees.files import Tree, TreeChoice
from medusa.trees.static import MedusaTree

PATIENCE = 8  # steps that another tree has to be the better one before it is used
TRIAL = 5  # steps of a trial
KEPT = 256  # steps of rows whose accepted tokens count
LEAST = 32  # of them, before a tree is judged by them alone
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
        return 1.0 if tree == PLAIN else fmean([*kept, *[tree.depth + 1] * (LEAST - len(kept))])

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
    """The times of steps of one kind, with each tree that they may have."""

    def __init__(self, trees: Iterable[Single]):
        self._times: dict[Single, deque[float]] = {tree: deque(maxlen=3 * TRIAL) for tree in trees}  # of the last steps
        self._since = dict.fromkeys(self._times, 0.0)  # seconds of steps with other trees since the last one with this
        self.trees = list(self._times)
        self.best = self.trees[0]
        self.speeds: dict[Single, float] = {}  # tokens per second with each tree over those of plain decoding

    def note(self, tree: Single, seconds: float) -> None:
        """A step with this tree took so long."""
        if tree in self._times:  # for some steps after a change, the tree may be one for fewer rows
            self._times[tree].append(seconds)
        for other in self._since:
            self._since[other] = 0.0 if other == tree else self._since[other] + seconds

    def next(self, tokens: Mapping[Single, float]) -> tuple[Single, bool]:
        """The tree for the next step, and whether that is a trial of another than the best.

        Args:
            tokens: the tokens per step of a row.
        """
        rates: dict[Single, float] = {}
        for tree, times in self._times.items():
            if len(times) < TRIAL:
                return tree, tree != self.best
            rates[tree] = tokens[tree] / median_low(times)
        self.speeds = {tree: rate / rates[PLAIN] for tree, rate in rates.items()}
        fastest = max(rates, key=rates.__getitem__)
        if rates[fastest] > MARGIN * rates[self.best]:
            self.best = fastest
        for tree, rate in rates.items():
            # A trial may lose little, and a tree that is nearly the best is tried often: its speed changes with the text.
            lost = TRIAL * median_low(self._times[tree]) * max(0.1, 1 - rate / rates[self.best])
            if tree != self.best and SHARE * self._since[tree] > lost:
                self._times[tree].clear()
                return tree, True
        return self.best, False


def name(tree: Single) -> str:
    """A tree in the log."""
    return "no tree" if tree == PLAIN else f"{len(tree)} nodes"
