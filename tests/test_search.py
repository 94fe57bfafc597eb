"""Claims about the tree search."""

import itertools

import pytest

from medusa import MedusaTree
from medusa.errors import InvalidInput
from medusa.metrics import expected_acceptance_length
from medusa.search import search_joint_tree, search_tree
from tiny import random_tree

ACCURACIES = [[0.5, 0.2, 0.1], [0.3, 0.25, 0.05], [0.2, 0.1, 0.1]]


def every_tree(nodes: int):
    """All prefix-closed trees of a size over a small set of paths."""
    paths = [path for depth in (1, 2) for path in itertools.product(range(2), repeat=depth)]
    for chosen in itertools.combinations(paths, nodes - 1):
        if all(path[:-1] == () or path[:-1] in chosen for path in chosen):
            yield MedusaTree(chosen)


@pytest.mark.parametrize("nodes", range(2, 7))
def test_searched_tree_is_the_best_of_its_size(nodes):
    accuracies = [[0.5, 0.3], [0.4, 0.35]]
    best = max(expected_acceptance_length(tree, accuracies) for tree in every_tree(nodes))
    found = search_tree(accuracies, nodes)
    assert len(found) == nodes
    assert expected_acceptance_length(found, accuracies) == pytest.approx(best)


def test_searched_tree_beats_random_and_dense_trees_of_its_size():
    searched = expected_acceptance_length(search_tree(ACCURACIES, 16), ACCURACIES)
    for seed in range(20):
        assert searched >= expected_acceptance_length(random_tree(seed, 16, ranks=3), ACCURACIES)
    assert searched >= expected_acceptance_length(MedusaTree.dense([3, 4]), ACCURACIES)


def test_larger_tree_holds_the_smaller():
    small, large = search_tree(ACCURACIES, 8), search_tree(ACCURACIES, 20)
    assert set(small.paths) < set(large.paths)


def test_guess_of_a_later_rank_may_be_the_better_one():
    assert search_tree([[0.1, 0.4]], 2).paths == ((1,),)


def test_useless_guesses_are_not_added():
    assert len(search_tree([[0.5, 0.0], [0.0]], 10)) == 2


@pytest.mark.parametrize(("accuracies", "nodes"), [([[0.5]], 0), ([[1.5]], 4), ([[float("nan")]], 4)])
def test_nonsense_is_refused(accuracies, nodes):
    with pytest.raises(InvalidInput):
        search_tree(accuracies, nodes)


def test_joint_search_is_the_best_of_its_size_on_what_came_true():
    paths = [((0,), 10), ((1,), 6), ((0, 0), 9), ((1, 0), 2), ((0, 1), 1), ((1, 1), 4)]
    counted = dict(paths)
    for nodes in range(2, 7):
        found = search_joint_tree(paths, nodes)
        best = max(sum(counted.get(path, 0) for path in tree.paths) for tree in every_tree(nodes))
        assert sum(counted[path] for path in found.paths) == best and len(found) == nodes
    assert len(search_joint_tree(paths, 100)) == 7 and len(search_joint_tree([], 5)) == 1
    with pytest.raises(InvalidInput):
        search_joint_tree(paths, 0)
