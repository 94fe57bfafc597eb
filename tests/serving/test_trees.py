"""Claims about which tree the rows of a step share: the fastest by the times of steps, found at little cost."""

import random

import pytest

from medusa import MedusaTree
from medusa.serving.trees import PATIENCE, PLAIN, Kind, TreeByLoad, scaled
from medusa.trees.files import TreeChoice
from tiny import random_tree

LARGE, SMALL = random_tree(seed=3, nodes=24), MedusaTree.dense([1, 1])
CHOICE = TreeChoice({1: LARGE, 2: SMALL, 4: PLAIN})
ACCEPTED = {LARGE: 2.2, SMALL: 1.5, PLAIN: 1.0}  # tokens per step


class Machine:
    """A machine on which a step takes a fixed time, and more for each token of all trees, give or take a tenth.

    Args:
        each: milliseconds for a token; 10 for the step itself.
        accepted: tokens per step with each tree.
    """

    def __init__(self, each: float, accepted: dict = ACCEPTED):
        self.each, self.accepted, self.chance = each, accepted, random.Random(0)

    def rate(self, tree, rows: int) -> float:
        """Tokens per millisecond."""
        return self.accepted[tree] / self.milliseconds(tree, rows)

    def milliseconds(self, tree, rows: int) -> float:
        return 10 + self.each * rows * len(tree)

    def decode(self, by_load: TreeByLoad, rows: int, steps: int) -> tuple[list, float]:
        """The trees of some steps, and how fast they were together, over the fastest tree in all of them."""
        used, tokens, taken = [], 0.0, 0.0
        for _ in range(steps):
            tree = by_load.choose(Kind.of(rows, 300), new=not used)
            taken_now = self.milliseconds(tree, rows) * self.chance.uniform(0.9, 1.1)
            mean = self.accepted[tree]
            by_load.note(taken_now / 1000, [int(mean) + (self.chance.random() < mean % 1) for _ in range(rows)])
            used, tokens, taken = [*used, tree], tokens + mean, taken + taken_now
        return used, tokens / taken / max(self.rate(tree, rows) for tree in by_load.candidates(rows))


@pytest.mark.parametrize(("each", "wanted"), [(0.1, LARGE), (2, SMALL), (12, PLAIN)])
def test_the_fastest_tree_is_found_and_trials_of_others_cost_little(each, wanted):
    used, speed = Machine(each).decode(TreeByLoad(CHOICE, measured=True), 1, 3000)
    assert used[0] == LARGE  # the file's comes first
    assert {LARGE, SMALL, PLAIN} == set(used)
    assert used[300:].count(wanted) > 0.85 * 2700
    assert speed > 0.92


def test_a_file_of_one_tree_gives_way_to_plain_decoding_where_that_is_faster():
    by_load, machine = TreeByLoad(SMALL, measured=True), Machine(2)
    alone, _ = machine.decode(by_load, 1, 400)
    crowd, _ = machine.decode(by_load, 16, 400)
    assert alone.count(SMALL) > 340 and crowd.count(PLAIN) > 340
    (of_tree, of_plain), (in_crowd, _) = ([speed for speed in by_load.speeds if speed.rows == rows] for rows in (1, 16))
    assert of_tree.nodes == 3 and of_tree.speedup == pytest.approx(1.5 * 12 / 16, rel=0.15)
    assert of_plain.speedup == 1 and in_crowd.speedup < 0.8


def test_it_follows_the_text():
    by_load = TreeByLoad(SMALL, measured=True)
    dull, _ = Machine(2, ACCEPTED | {SMALL: 1.1}).decode(by_load, 2, 1000)
    copied, _ = Machine(2, ACCEPTED | {SMALL: 3.0}).decode(by_load, 2, 3000)
    assert dull[-200:].count(PLAIN) > 180 and copied[-1000:].count(SMALL) > 950


def test_trees_for_fewer_rows_are_not_tried():
    by_load = TreeByLoad(CHOICE, measured=True)
    assert by_load.candidates(1) == [LARGE, SMALL, PLAIN] == by_load.all
    assert by_load.candidates(3) == [SMALL, PLAIN] and by_load.candidates(9) == [PLAIN]


def test_lengths_and_grammars_are_measured_apart():
    kinds = Kind.of(2, 10), Kind.of(2, 255), Kind.of(2, 256), Kind.of(2, 10, guided=True)
    assert kinds[0] == kinds[1] and len(set(kinds)) == 3
    by_load = TreeByLoad(SMALL, measured=True)
    Machine(30).decode(by_load, 2, 200)
    assert {speed.length for speed in by_load.speeds} == {512}
    assert by_load.choose(Kind.of(2, 10), new=True) == PLAIN  # as with other lengths, until it is measured
    assert by_load.choose(Kind.of(2, 10, guided=True), new=True) == SMALL  # nothing is known


def test_without_times_the_file_decides_and_not_at_every_change():
    by_load = TreeByLoad(CHOICE)
    assert by_load.choose(Kind.of(4, 9), new=True) == PLAIN
    alone = [by_load.choose(Kind.of(1, 9), new=False) for _ in range(PATIENCE)]
    assert alone == [PLAIN] * (PATIENCE - 1) + [LARGE]
    assert [by_load.choose(Kind.of(rows, 9), new=False) for rows in (2, 2, 1, 2, 2, 1)] == [LARGE] * 6
    by_load.note(1.0, [1])
    assert by_load.speeds == []


class Crowd(Machine):
    """SmolLM2 on two cores, roughly: a tree of eight nodes is the faster way up to three rows, and loses from four on."""

    TREE = random_tree(seed=3, nodes=8)

    def __init__(self, seed: int):
        super().__init__(0, {self.TREE: 2.0, PLAIN: 1.0})
        self.chance = random.Random(seed)

    def milliseconds(self, tree, rows: int) -> float:
        return 75 + 4 * rows if tree == PLAIN else 110 + 20 * rows


def lost(crowd: Crowd, by_load: TreeByLoad, *loads: tuple[int, int]) -> float:
    """The share of time that other trees than the fastest lose, with so many rows for so many steps."""
    taken = needed = 0.0
    for rows, steps in loads:
        used, _ = crowd.decode(by_load, rows, steps)
        fastest = max(crowd.rate(tree, rows) for tree in crowd.accepted)
        taken += sum(crowd.milliseconds(tree, rows) for tree in used)
        needed += sum(crowd.accepted[tree] / fastest for tree in used)
    return 1 - needed / taken


@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_loses_little_while_its_trees_are_tried(seed):
    crowd = Crowd(seed)
    assert lost(crowd, TreeByLoad(crowd.TREE, measured=True), (8, 200)) <= 0.05
    joining = [(rows, 1) for rows in range(1, 8)]
    assert lost(crowd, TreeByLoad(crowd.TREE, measured=True), *joining, (8, 200)) <= 0.05


@pytest.mark.parametrize("seed", range(4))
def test_what_is_known_of_fewer_and_of_more_rows_counts_for_others(seed):
    crowd, by_load = Crowd(seed), TreeByLoad(Crowd.TREE, measured=True)
    crowd.decode(by_load, 4, 100)  # the tree loses, so it does with more rows
    assert lost(crowd, by_load, *((rows, 40) for rows in (5, 9, 16, 8, 12))) <= 0.03
    coming_and_going = [(crowd.chance.randint(1, 16), crowd.chance.randint(1, 9)) for _ in range(200)]
    assert lost(crowd, by_load, *coming_and_going) <= 0.03
    assert crowd.decode(by_load, 1, 50)[0].count(Crowd.TREE) > 40


def test_the_cost_with_fewer_rows_follows_from_that_with_more():
    machine = Machine(2)
    cost = {rows: machine.milliseconds(LARGE, rows) / machine.milliseconds(PLAIN, rows) for rows in (3, 8)}
    assert scaled(cost[8], len(LARGE), 3 / 8) == pytest.approx(cost[3])
    assert scaled(0.9, 8, 0.5) == 1 and scaled(9.0, 8, 0.5) == 8
