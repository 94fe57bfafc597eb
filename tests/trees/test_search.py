"""Claims about the tree search."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog

from medusa import MedusaTree
from medusa.errors import InvalidInput
from medusa.metrics import expected_acceptance_length, path_chances
from medusa.trees.files import preset, presets
from medusa.trees.search import random_dense_tree, search_joint_tree, search_tree
from tiny import random_tree

ACCURACIES = [[0.5, 0.2, 0.1], [0.3, 0.25, 0.05], [0.2, 0.1, 0.1]]
# How often one of the first i guesses is right, i = 1 … 5, of the five public Medusa-1 heads of each Vicuna v1.3: what their
# authors logged in training (assets/medusa_acc.csv of their repository), in thousandths.
PUBLISHED = {
    "7b": [
        [560, 672, 727, 760, 780],
        [316, 424, 485, 528, 562],
        [201, 288, 348, 383, 417],
        [147, 225, 274, 311, 340],
        [118, 187, 235, 272, 300],
    ],
    "13b": [
        [594, 705, 758, 792, 816],
        [340, 440, 507, 546, 580],
        [216, 309, 361, 403, 436],
        [150, 232, 288, 323, 354],
        [122, 196, 243, 279, 307],
    ],
    "33b": [
        [605, 716, 765, 798, 822],
        [356, 469, 529, 569, 596],
        [225, 320, 379, 421, 446],
        [160, 249, 307, 348, 376],
        [137, 207, 262, 298, 326],
    ],
}


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


def published(size: str) -> list[list[float]]:
    """The accuracies of guesses by themselves; those of ranks 6 to 10, which were not logged, go on falling as from 4 to 5."""
    tables = [np.diff(row, prepend=0) / 1000 for row in PUBLISHED[size]]
    return [[*row, *(row[-1] * (row[-1] / row[-2]) ** n for n in range(1, 6))] for row in tables]


@pytest.mark.parametrize("size", PUBLISHED)
def test_searched_tree_gains_at_least_what_every_published_tree_does_by_published_accuracies(size):
    accuracies = published(size)
    searched = search_tree(accuracies, 64)
    assert len(searched) == 64
    found = expected_acceptance_length(searched, accuracies)
    assert all(found >= expected_acceptance_length(preset(name), accuracies) for name in presets())
    # The paper's Figure 4: 64 nodes, searched, against random dense trees of 256; now and then one of them is as good.
    dense = [expected_acceptance_length(random_dense_tree(256, 4, seed), accuracies) for seed in range(50)]
    assert sum(found > other for other in dense) >= 45


def accuracies_behind(tree: MedusaTree, heads: int = 4, ranks: int = 10) -> list[list[float]]:
    """Accuracies by which a tree is the best of its size: their logarithms fall with the rank, and along the path of any leaf
    they sum to more than along that of any node just outside the tree."""

    def terms(*path):
        row = np.zeros((heads, ranks))
        row[range(len(path)), path] = 1
        return row.ravel()

    inner = {path[:-1] for path in tree.paths}
    leaves = [path for path in tree.paths if path not in inner]
    above = [path for path in ((), *tree.paths) if len(path) < heads]
    fringe = [min((*path, rank) for rank in range(ranks + 1) if (*path, rank) not in tree.paths) for path in above]
    apart = [terms(*out) - terms(*leaf) for leaf in leaves for out in fringe if out[-1] < ranks]
    falling = [terms(*(0,) * k, i) - terms(*(0,) * k, i - 1) for k in range(heads) for i in range(1, ranks)]
    limits = [-0.01] * len(apart) + [0] * len(falling)
    bounds = [(math.log(1e-4), math.log(0.04 if rank else 0.6)) for _ in range(heads) for rank in range(ranks)]
    solved = linprog(np.zeros(heads * ranks), np.array(apart + falling), limits, bounds=bounds)
    assert solved.status == 0, solved.message
    return np.exp(solved.x).reshape(heads, ranks).tolist()


@pytest.mark.parametrize("name", presets())
def test_search_finds_a_published_tree_again_from_accuracies_that_explain_it(name):
    tree = preset(name)
    accuracies = accuracies_behind(tree)
    assert search_tree(accuracies, 64) == tree
    found = expected_acceptance_length(tree, accuracies)
    assert all(found >= expected_acceptance_length(preset(other), accuracies) for other in presets())


def test_guess_of_a_later_rank_may_be_the_better_one():
    assert search_tree([[0.1, 0.4]], 2).paths == ((1,),)


def test_useless_guesses_are_not_added():
    assert len(search_tree([[0.5, 0.0], [0.0]], 10)) == 2


@pytest.mark.parametrize(
    ("accuracies", "nodes", "message"),
    [
        ([[0.5]], 0, "at least the root"),
        ([[0.5], [1.5]], 4, r"head 2 is 1\.5, expected a number from 0 to 1"),
        ([[-0.1]], 4, r"head 1 is -0\.1"),
        ([[float("nan")]], 4, "head 1 is nan"),
        ([[True]], 4, "head 1 is True"),
        ([["0.5"]], 4, "head 1 is '0.5'"),
        ([[0.6, 0.8, 0.9]], 4, r"head 1 add up to 2\.3.*exactly guess i"),
        ([], 4, r"accuracies are \[\], expected a list for every head"),
        ({"1": [0.5]}, 4, "expected a list for every head"),
        ([[0.5], []], 4, r"head 2 are \[\]"),
        ([0.5, 0.2], 4, r"head 1 are 0\.5, expected a list"),
    ],
)
def test_nonsense_is_refused(accuracies, nodes, message):
    with pytest.raises(InvalidInput, match=message):
        search_tree(accuracies, nodes)


def test_accuracies_may_add_up_to_a_little_over_one_by_rounding():
    assert len(search_tree([[0.67, 0.335]], 3)) == 3


def test_chance_of_a_path_is_the_product_of_its_guesses_and_0_beyond_the_accuracies():
    tree = MedusaTree([(0,), (0, 1), (0, 1, 0), (4,)])
    assert path_chances(tree, [[0.5, 0.1], [0.4, 0.3]]) == {(0,): 0.5, (0, 1): 0.15, (0, 1, 0): 0.0, (4,): 0.0}


@pytest.mark.parametrize("heads", [2, 3, 4, 5])
@pytest.mark.parametrize("nodes", [4, 16, 32, 64, 100, 128, 256])
def test_random_dense_tree_is_cartesian_and_of_about_its_size(nodes, heads):
    trees = [random_dense_tree(nodes, heads, seed) for seed in range(12)]
    for tree in trees:
        assert abs(len(tree) - nodes) <= nodes / 16 and tree.depth <= heads
        sizes = [1 + max(path[depth] for path in tree.paths if len(path) > depth) for depth in range(tree.depth)]
        assert tree == MedusaTree.dense(sizes)
    assert trees == [random_dense_tree(nodes, heads, seed) for seed in range(12)]
    assert len(set(trees)) > (1 if nodes < 16 or heads == 2 else 5)


def test_random_dense_tree_takes_ranks_beyond_ten_only_where_it_must():
    assert all(random_dense_tree(64, 3, seed).max_rank < 10 for seed in range(30))
    assert random_dense_tree(64, 1, 0).max_rank > 50 and random_dense_tree(1, 3, 0) == MedusaTree([])


@pytest.mark.parametrize(("nodes", "heads"), [(0, 4), (16, 0)])
def test_random_dense_tree_needs_a_node_and_a_head(nodes, heads):
    with pytest.raises(InvalidInput, match="at least a node and a head"):
        random_dense_tree(nodes, heads, 0)


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
