"""Claims about acceptance, against a slow walk over the tree."""

import math
from dataclasses import fields

import pytest
import torch

from medusa import MedusaTree
from medusa.acceptance import TypicalAcceptance, accept_drawn, accept_exact, accept_typical
from medusa.errors import InvalidInput
from tiny import random_tree


def walk_exact(tree: MedusaTree, tokens: list[int], said: list[int]) -> list[int]:
    """Node by node, as the definition has it."""
    path = [0]
    while True:
        children = [n for n, parent in enumerate(tree.parents) if parent == path[-1] and tokens[n] == said[path[-1]]]
        if not children:
            return path
        path.append(children[0])


@pytest.mark.parametrize("seed", range(5))
def test_exact_acceptance_is_the_walk_from_the_root(seed):
    tree = random_tree(seed, nodes=60, depth=4, ranks=4)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(8, len(tree), dtype=torch.long)
    for node, path in enumerate(tree.paths, 1):  # siblings differ, as guesses of one head do
        tokens[:, node] = path[-1]
    said = torch.randint(0, 4, tokens.shape, generator=generator)
    accepted = accept_exact(tree.tensors(), tokens, said)
    drawn = accept_drawn(tree.tensors(), tokens, lambda node: said.gather(1, node[:, None])[:, 0])
    assert all(torch.equal(getattr(drawn, field.name), getattr(accepted, field.name)) for field in fields(accepted))
    lengths = set()
    for row in range(len(tokens)):
        path = walk_exact(tree, tokens[row].tolist(), said[row].tolist())
        assert accepted.length[row] == len(path)
        assert accepted.path[row, : len(path)].tolist() == path
        assert (accepted.path[row, len(path) :] == -1).all()
        assert accepted.node[row] == path[-1]
        assert accepted.bonus[row] == said[row, path[-1]]
        lengths.add(len(path))
    assert len(lengths) > 1  # the case is not trivial


def test_root_is_always_accepted_and_padding_never():
    tree = MedusaTree([]).tensors()
    accepted = accept_exact(tree, torch.tensor([[0]]), torch.tensor([[0]]))
    assert accepted.length.tolist() == [1] and accepted.bonus.tolist() == [0]


def test_token_zero_in_a_path_is_a_token_like_any_other():
    tree = MedusaTree([(0,), (0, 0)]).tensors()
    accepted = accept_exact(tree, torch.tensor([[5, 0, 0]]), torch.tensor([[0, 0, 9]]))
    assert accepted.length.tolist() == [3] and accepted.bonus.tolist() == [9]


def test_a_repeated_path_is_followed_in_the_branch_that_goes_on():
    tree = MedusaTree([(0,), (1,), (1, 0)]).tensors()  # nodes 1 and 2 hold the same token, and only node 2 has a child
    tokens, said = torch.tensor([[9, 7, 7, 4]]), torch.tensor([[7, 4, 4, 5]])
    for accepted in (
        accept_exact(tree, tokens, said),
        accept_drawn(tree, tokens, lambda node: said.gather(1, node[:, None])[:, 0]),
    ):
        assert accepted.path.tolist() == [[0, 2, 3]] and accepted.bonus.tolist() == [5]


def typical_by_hand(tree: MedusaTree, tokens: list[int], scores: torch.Tensor, epsilon: float, delta: float) -> int:
    """The deepest node whose path is typical, among equals the likeliest (paper 2.3.1), node by node."""
    best, best_key = 0, (0, 0.0)
    for node in range(1, len(tree)):
        likelihood, depth, ok, at = 0.0, 0, True, node
        while at:
            p = scores[tree.parents[at]].double().softmax(-1)
            entropy = -sum(x * math.log(x) for x in p.tolist() if x > 0)
            chance = p[tokens[at]].item()
            ok &= chance > min(epsilon, delta * math.exp(-entropy))
            likelihood += math.log(max(chance, 1e-300))
            depth, at = depth + 1, tree.parents[at]
        if ok and (depth, likelihood) > best_key:
            best, best_key = node, (depth, likelihood)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_typical_acceptance_is_the_papers_rule(seed):
    tree = random_tree(seed, nodes=40, depth=3, ranks=6)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 8, (5, len(tree)), generator=generator)
    scores = 2 * torch.randn(5, len(tree), 8, generator=generator)
    scores[:, :, 7] = -torch.inf  # as top-k leaves it
    accepted = accept_typical(tree.tensors(), tokens, scores, TypicalAcceptance(0.09, 0.3))
    for row in range(5):
        assert accepted.node[row] == typical_by_hand(tree, tokens[row].tolist(), scores[row], 0.09, 0.3)
    assert torch.equal(accepted.bonus, scores.argmax(-1).gather(1, accepted.node[:, None])[:, 0])


def test_typical_acceptance_of_a_sure_backbone_is_greedy():
    tree = MedusaTree([(0,), (1,), (1, 0)]).tensors()
    scores = torch.full((1, 4, 6), -100.0)
    scores[0, 0, 3] = scores[0, 2, 4] = scores[0, 3, 5] = 100.0
    accepted = accept_typical(tree, torch.tensor([[1, 2, 3, 4]]), scores, TypicalAcceptance())
    assert accepted.path.tolist() == [[0, 2, 3]] and accepted.bonus.tolist() == [5]


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.3), (1.5, 0.3), (0.09, -1.0)])
def test_threshold_out_of_range_is_refused(epsilon, delta):
    with pytest.raises(InvalidInput, match="expected a number in"):
        TypicalAcceptance(epsilon, delta)
