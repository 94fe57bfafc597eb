"""Claims about candidate trees."""

import json

import pytest
import torch

from medusa import MedusaTree, load_tree
from medusa.errors import CheckpointError, InvalidTree
from medusa.trees.files import save_tree
from tiny import random_tree


def test_nodes_are_in_lexicographic_order_with_parents_first():
    tree = MedusaTree([(1,), (0, 2), (0,), (0, 0), (0, 0, 1)])
    assert tree.paths == ((0,), (0, 0), (0, 0, 1), (0, 2), (1,))
    assert tree.parents == (-1, 0, 1, 2, 1, 0)


def test_dense_tree_is_the_cartesian_product():
    tree = MedusaTree.dense([2, 3])
    assert len(tree) == 1 + 2 + 6
    assert set(tree.paths) == {(i,) for i in range(2)} | {(i, j) for i in range(2) for j in range(3)}


def test_lineage_and_ancestors_agree_with_the_paths():
    tree = random_tree(seed=3, nodes=40, depth=4)
    tensors = tree.tensors()
    for node, path in enumerate(((), *tree.paths)):
        lineage = [n for n in tensors.lineage[0, node].tolist() if n >= 0]
        assert lineage == [0, *(1 + tree.paths.index(path[: i + 1]) for i in range(len(path)))]
        assert tensors.ancestors[0, node].nonzero().flatten().tolist() == sorted(lineage)
        assert tensors.depths[0, node] == len(path)


def test_rank_of_ten_or_more_stays_with_its_own_head():
    tree = MedusaTree([(12,), (12, 0), (12, 11)])
    head_logits = torch.stack([-torch.arange(40.0), torch.arange(40.0)])[:, None]  # head 1 ranks 0.., head 2 ranks 39..
    drafter = tree.drafter()
    tokens, _ = drafter.assemble(torch.tensor([7]), drafter.guess(head_logits))
    assert tokens.tolist() == [[7, 12, 39, 28]]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0, 1)], "lacks its parent"),
        ([()], "the root is implicit"),
        ([(0,), (0,)], "given twice"),
        ([(-1,)], "integer of at least 0"),
        ([("0",)], "integer of at least 0"),
    ],
)
def test_malformed_tree_is_refused(paths, message):
    with pytest.raises(InvalidTree, match=message):
        MedusaTree(paths)


def test_tree_that_does_not_fit_the_heads_is_refused():
    with pytest.raises(InvalidTree, match="needs 3 heads, there are 2"):
        MedusaTree([(0,), (0, 0), (0, 0, 0)]).check(num_heads=2, vocab_size=10)
    with pytest.raises(InvalidTree, match="rank 10, the vocabulary has 10"):
        MedusaTree([(10,)]).check(num_heads=1, vocab_size=10)


def test_save_and_load_round_trip(tmp_path):
    tree = random_tree(seed=5, nodes=30)
    save_tree(tree, tmp_path / "tree.json")
    assert load_tree(tmp_path / "tree.json") == tree
    (tmp_path / "bare.json").write_text(json.dumps([[0], [0, 1]]))
    assert load_tree(tmp_path / "bare.json") == MedusaTree([(0,), (0, 1)])


@pytest.mark.parametrize("content", ["{", '{"nodes": 3}', "[1, 2]", '"tree"'])
def test_file_that_is_no_tree_is_refused(tmp_path, content):
    (tmp_path / "tree.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tree\.json"):
        load_tree(tmp_path / "tree.json")


def test_missing_tree_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tree file"):
        load_tree(tmp_path / "none.json")
