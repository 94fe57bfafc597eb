"""Which tree the rows of a step share: what the model's tree file says for their number, or what the time of steps says."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from statistics import fmean, median
from typing import NamedTuple

from medusa.serving.requests import Speed
from medusa.trees.dynamic import DynamicTree
from medusa.trees.files import Tree, TreeChoice
from medusa.trees.static import MedusaTree

PATIENCE = 8  # steps that the file has to name another tree before it is used
LEAST_TRIALS = 5  # steps with a tree before its cost is known
CLEAR = 1.3  # how many times as fast, or as slow, two trials have to show a tree to be to decide without the others
KEPT = 256  # steps of rows whose accepted tokens count
LEAST_STEPS = 32  # of them, before acceptance is known
MARGIN = 1.03  # how many times as fast another tree has to be
SHARE = 0.01  # of the time: the most that trials of another tree may lose
LEAST_LOSS = 0.1  # of a trial's time: what it counts for, even of a tree that is nearly the best
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
        """The kind of a step of `rows` rows, the longest of which has `length` tokens."""
        return cls(rows, max(256, 1 << length.bit_length()), guided)


class TreeByLoad:
    """Chooses the tree of each step. The output is the same with any.

    Args:
        tree: the model's; a `TreeChoice` names one for each number of rows, of which some may be plain decoding.
        measured: whether to time the steps, and to use what is fastest for their number and length: the file's tree for
            that number or a greater one, or plain decoding. Otherwise, the file decides.
    """

    def __init__(self, tree: Tree, measured: bool = False):
        self._tree, self._measured = tree, measured
        self.used = tree.for_batch(1)
        self._waited = 0
        self._paces: dict[Kind, Pace] = {}
        self._kept: dict[tuple[Single, bool], deque[int]] = {}  # tokens of each row in the last steps, by tree and `guided`
        self._now: Kind | None = None  # the kind of the step that was chosen for
        self._purse = 0.0  # seconds that trials may lose, by the steps of all kinds so far

    @property
    def all(self) -> list[Single]:
        """All trees that it may choose."""
        trees = [*self._tree.trees.values()] if isinstance(self._tree, TreeChoice) else [self._tree]
        return list(dict.fromkeys(trees + [PLAIN] * self._measured))

    def candidates(self, rows: int) -> list[Single]:
        """The trees that it may choose for a number of rows; the file's comes first."""
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
        if self._measured and len(trees := self.candidates(kind.rows)) > 1:
            pace = self._paces.setdefault(kind, Pace(trees))
            if kind != self._now:
                pace.resume(self._estimates(kind, trees))
            self._now = kind
            self.used, self._waited = self._next(kind), 0
            return self.used
        self._now = kind
        wanted = self._tree.for_batch(kind.rows)
        self._waited = 0 if wanted == self.used else self._waited + 1
        if new or self._waited >= PATIENCE:
            self.used, self._waited = wanted, 0
        return self.used

    def _next(self, kind: Kind) -> Single:
        """The tree for a step according to the times so far."""
        pace = self._paces[kind]
        before = pace.best
        found = pace.next({tree: self._tokens(tree, kind.guided) for tree in pace.trees}, self._purse)
        if pace.best != before and pace.speeds:
            speeds = ", ".join(f"{name(tree)} {speed:.2f}" for tree, speed in pace.speeds.items())
            log.info(
                "%d rows of up to %d tokens decode with %s: times as fast as plain decoding are %s",
                kind.rows,
                kind.length,
                name(pace.best),
                speeds,
            )
        return found

    def _estimates(self, kind: Kind, trees: Iterable[Single]) -> dict[Single, float]:
        """What steps of a kind cost with each tree, in plain steps, by what is known of kinds like it.

        A tree costs no less than with fewer rows, and no more than with more rows: if a step takes a time of its own and a time
        for each token, then the time of a token follows from the cost with more rows.
        """
        found = {}
        for tree in trees:
            paces = {of: pace for of, pace in self._paces.items() if of.guided == kind.guided}
            known = {of: pace.costs[tree] for of, pace in paces.items() if tree in pace.costs}
            nearest = sorted(known, key=lambda of: (abs(of.rows - kind.rows), abs(math.log2(of.length / kind.length))))
            fewer = [known[of] for of in nearest if of.rows <= kind.rows][:1]
            more = [scaled(known[of], len(tree), kind.rows / of.rows) for of in nearest if of.rows > kind.rows][:1]
            if fewer or more:
                found[tree] = max(fewer + more)
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
            self._purse += SHARE * seconds - self._paces[self._now].note(self.used, seconds)

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

    Args:
        trees: the trees; the first is used until another is known to be faster.
    """

    def __init__(self, trees: Iterable[Single]):
        self.trees = list(trees)
        self.best = self.trees[0]
        self._guesses: dict[Single, float] = {}  # what trees cost in steps of the best, as far as other kinds tell
        self._trials: dict[Single, deque[float]] = {tree: deque(maxlen=3 * LEAST_TRIALS) for tree in self.trees}  # measured
        self._since = dict.fromkeys(self.trees, 0)  # steps of the best tree since each was tried
        self._loss = 0.0  # seconds that the trial loses that was chosen last
        self.before: float | None = None  # seconds of the step before, if it was one of the best tree
        self.costs: dict[Single, float] = {}  # in plain steps, of the trees that were measured
        self.speeds: dict[Single, float] = {}  # tokens per second with each tree over those of plain decoding

    def resume(self, estimates: Mapping[Single, float]) -> None:
        """Steps were of another kind; `estimates` are what trees cost in plain steps, as far as is known."""
        self.before = None
        if self.best in estimates:
            self._guesses = {tree: cost / estimates[self.best] for tree, cost in estimates.items()}

    def note(self, tree: Single, seconds: float) -> float:
        """A step with this tree took `seconds`; returns how many of them are lost, if it was a trial."""
        if tree == self.best:
            self.before = seconds
            self._since = {other: since + 1 for other, since in self._since.items()}
            return 0.0
        assert self.before is not None
        self._trials[tree].append(seconds / self.before)
        self._since[tree], self.before = 0, None
        return self._loss

    def next(self, tokens: Mapping[Single, float], purse: float) -> Single:
        """The tree for the next step: the best, or another as a trial.

        Args:
            tokens: the tokens per step of a row with each tree.
            purse: seconds that a trial may lose.
        """
        doubtful = [tree for tree in self.trees if self._doubtful(tree, tokens[tree] / tokens[self.best])]
        costs = {tree: self._cost(tree, tree in doubtful) for tree in self.trees}
        rates = {tree: tokens[tree] / cost for tree, cost in costs.items()}
        self._know(costs, rates, {tree for tree in self.trees if tree == self.best or self._trials[tree]} - {*doubtful})
        fastest = max((tree for tree in self.trees if tree not in doubtful or tree in self._guesses), key=rates.__getitem__)
        if rates[fastest] > MARGIN * rates[self.best]:
            self._lead(fastest, costs[fastest])
            return self.best
        if self.before is None:
            return self.best
        # With fewer nodes the trial is cheap, and the best may cost more than was guessed: what a tree costs rises with rows.
        urgent = [tree for tree in doubtful if tree not in self._guesses or len(tree) < len(self.best)]
        if urgent:
            self._loss = 0.0  # cannot be told yet
            return urgent[0]
        # What trials lose is limited, and a tree that is nearly the best is tried often: acceptance changes with the text.
        losses = {tree: costs[tree] * max(LEAST_LOSS, 1 - rates[tree] / rates[self.best]) for tree in self.trees}
        tried = max((tree for tree in self.trees if tree != self.best), key=lambda tree: self._since[tree] / losses[tree])
        self._loss = self.before * losses[tried]
        return tried if purse > self._loss else self.best

    def _cost(self, tree: Single, doubtful: bool) -> float:
        """What a step costs with a tree, in steps of the best: by its trials, and its guess while they are too few."""
        if tree == self.best:
            return 1.0
        trials = [*self._trials[tree]]
        if doubtful and tree in self._guesses:
            trials += [self._guesses[tree]] * (LEAST_TRIALS - len(trials))
        return median(trials or [1.0])

    def _doubtful(self, tree: Single, tokens: float) -> bool:
        """Whether more trials are needed to tell if a tree, with `tokens` times the tokens of the best, is faster."""
        trials = self._trials[tree]
        if tree == self.best or len(trials) >= LEAST_TRIALS:
            return False
        return len(trials) < 2 or (tokens / max(trials) < CLEAR and tokens / min(trials) > 1 / CLEAR)

    def _know(self, costs: Mapping[Single, float], rates: Mapping[Single, float], measured: Collection[Single]) -> None:
        """Keep what can be told of trees that were measured."""
        if len(measured) > 1 and PLAIN in measured:
            self.costs = {tree: costs[tree] / costs[PLAIN] for tree in measured}
            self.speeds = {tree: rates[tree] / rates[PLAIN] for tree in self.trees if tree in measured}

    def _lead(self, tree: Single, cost: float) -> None:
        """A tree is the best from now on; costs are relative to its own."""
        number = len(self._trials[tree])
        for costs in self._trials.values():
            relative = [each / cost for each in costs]
            costs.clear()
            costs.extend(relative)
        self._guesses = {other: each / cost for other, each in self._guesses.items()}
        self._trials[self.best].extend([1 / cost] * number)
        self._trials[tree].clear()
        self.best, self.before = tree, None


def scaled(cost: float, nodes: int, rows: float) -> float:
    """What a tree costs, in plain steps, with `rows` times the rows with which it has this cost.

    Where a step takes 1 and each token of a row takes t, the cost is (1 + t * nodes) / (1 + t).
    """
    if not 1 < cost < nodes:
        return min(max(cost, 1.0), float(nodes))
    token = (cost - 1) / (nodes - cost) * rows
    return (1 + token * nodes) / (1 + token)


def name(tree: Single) -> str:
    """A tree in the log."""
    return "no tree" if tree == PLAIN else f"{len(tree)} nodes"
