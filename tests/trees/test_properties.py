"""Claims about any tree: files, tensors and numbering."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa import DynamicTree, MedusaTree, load_tree
from medusa.trees.dynamic import _depth_first
from medusa.trees.files import TreeChoice, save_tree
from medusa.trees.tensors import paths_up, tree_tensors

few = settings(max_examples=100, derandomize=True, deadline=None)
paths = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), max_size=12)
static = paths.map(lambda found: MedusaTree({tuple(path[: end + 1]) for path in found for end in range(len(path))}))
dynamic = st.builds(
    DynamicTree,
    num_nodes=st.integers(8, 64),
    depth=st.integers(1, 5),
    ranks=st.integers(1, 20),
    pair_bonus=st.floats(0, 4),
    copied=st.integers(0, 6),
)
choices = st.dictionaries(st.integers(1, 64), st.one_of(static, dynamic), min_size=1, max_size=3).map(TreeChoice)
# Nodes numbered so that each comes after its parent, which is the first node or any before it.
parents = st.integers(1, 20).flatmap(lambda n: st.tuples(*(st.integers(0, max(0, node - 1)) for node in range(n))))


@few
@given(tree=st.one_of(static, dynamic, choices))
def test_any_tree_comes_back_from_its_file(tmp_path_factory, tree):
    file = tmp_path_factory.mktemp("tree") / "tree.json"
    save_tree(tree, file)
    assert load_tree(file) == tree


@few
@given(static)
def test_tensors_say_what_the_paths_say(tree):
    tensors, nodes = tree.tensors(), [(), *tree.paths]
    assert tensors.num_nodes == len(tree) and tensors.depths[0].tolist() == [len(path) for path in nodes]
    for node, path in enumerate(nodes):
        lineage = [nodes.index(path[:length]) for length in range(len(path) + 1)]
        assert tensors.lineage[0, node].tolist() == lineage + [-1] * (tree.depth - len(path))
        assert tensors.ancestors[0, node].nonzero()[:, 0].tolist() == sorted(lineage)
        assert tensors.parents[0, node] == (lineage[-2] if path else 0)


@few
@given(static)
def test_static_nodes_are_numbered_depth_first_with_parents_first(tree):
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert is_depth_first(torch.tensor(tree.parents).clamp(min=0), tree.depth)


@few
@given(parents)
def test_depth_first_numbering_keeps_parents_first_and_the_likeliest_path_in_place(above):
    above, depth = torch.tensor(above), len(above)
    order = _depth_first(above[None], paths_up(above[None], depth)[1])[0]
    assert order.sort().values.tolist() == list(range(len(above))) and order[0] == 0
    assert all(order[above[node]] < order[node] for node in range(1, len(above)))
    numbered = torch.empty_like(above).scatter_(0, order, order[above])
    assert is_depth_first(numbered, depth)
    best, number = 0, 0  # down the first child of each
    while (children := [node for node in range(1, len(above)) if above[node] == best]) != []:
        best, number = children[0], number + 1
        assert order[best] == number


def is_depth_first(above: torch.Tensor, depth: int) -> bool:
    """Whether the nodes at or below each node are numbered one after the other, beginning with it."""
    ancestors = tree_tensors(above[None], depth).ancestors[0]
    below = [ancestors[:, node].nonzero()[:, 0].tolist() for node in range(len(above))]
    return all(nodes == list(range(node, node + len(nodes))) for node, nodes in enumerate(below))
