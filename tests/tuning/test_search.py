"""Claims about the tree search and the calibration it stands on."""

import itertools

import pytest
import torch

from medusa import MedusaModel, MedusaTree
from medusa.errors import InvalidInput
from medusa.metrics import expected_acceptance_length
from medusa.tuning.calibrate import calibrate
from medusa.tuning.search import search_tree
from tiny import VOCAB, plain_greedy, random_heads, random_prompt, random_tree, tiny_backbone

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


def test_calibration_counts_each_guess_where_decoding_asks_for_it():
    backbone = tiny_backbone()
    model = MedusaModel(backbone, random_heads(backbone, 2), MedusaTree([(0,)]))
    prompt, new = random_prompt(6), 12
    calibration = calibrate(model, [prompt[0]], max_new_tokens=new, ranks=VOCAB)
    tokens = plain_greedy(backbone, prompt, new)
    full = prompt[0].tolist() + tokens
    hits = [[0] * VOCAB for _ in range(2)]
    asked = [0, 0]
    with torch.no_grad():
        for t in range(5, len(full)):  # the last committed token, from the end of the prompt on
            h = model.hidden_states(torch.tensor([full[: t + 1]]))[0, -1]
            for k in range(2):
                if t + k + 2 < len(full):
                    rank = model.heads(h)[k].topk(VOCAB).indices.tolist().index(full[t + k + 2])
                    hits[k][rank] += 1
                    asked[k] += 1
    assert calibration.asked == asked
    assert sum(abs(a - b) for x, y in zip(calibration.hits, hits, strict=True) for a, b in zip(x, y, strict=True)) == 0


def test_calibration_without_heads_is_refused():
    with pytest.raises(InvalidInput, match="no heads"):
        calibrate(MedusaModel(tiny_backbone()), [random_prompt(4)[0]])
