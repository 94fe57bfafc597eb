"""Acceptance: which drafted tokens agree with the backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from medusa.errors import InvalidInput
from medusa.sampling import likeliest
from medusa.trees.tensors import TreeTensors


@dataclass(frozen=True)
class TypicalAcceptance:
    """Thresholds of typical acceptance (paper 2.3.1): a fixed one, and one that falls with entropy."""

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self):
        for name in ("epsilon", "delta"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise InvalidInput(f"{name} is {value}, expected a number in (0, 1]")


@dataclass(frozen=True)
class Accepted:
    """The accepted path of every row."""

    node: Tensor  # (B,) long: the deepest accepted node
    path: Tensor  # (B, D + 1) long: nodes from the root to it, then -1
    length: Tensor  # (B,) long: nodes on the path, the root included
    bonus: Tensor  # (B,) long: the backbone's token after the path, the next root

    def replaced(
        self,
        rows: Tensor,  # (B,) bool
        other: Accepted,
    ) -> Accepted:
        """The other's paths in some rows, these in the rest."""
        pairs = {field.name: (getattr(other, field.name), getattr(self, field.name)) for field in fields(self)}
        return Accepted(**{name: torch.where(rows[:, None] if a.ndim > 1 else rows, a, b) for name, (a, b) in pairs.items()})


def accept_exact(
    tree: TreeTensors,
    tokens: Tensor,  # (B, N) long: the token of every node
    target: Tensor,  # (B, N) long: the backbone's own token after every node
) -> Accepted:
    """Descend while a child is the backbone's own token after its parent.

    With the argmax as `target` this is greedy acceptance. With a draw from the backbone's distribution p at every node it
    is exact sampling: the token after each accepted node is that one draw, whether the tree held it or not, so the output
    is distributed as p for any tree that depends only on the past. The draw is accepted whenever the tree holds it, so no
    rule accepts more of the same candidates.
    """
    agreed = tokens == target.gather(1, tree.parents.expand_as(tokens))
    node = _reachable(tree, agreed).mul(tree.depths + 1).argmax(-1)  # at most one node at each depth is reachable
    return _accepted(tree, node, target.gather(1, node[:, None]).squeeze(1))


def accept_drawn(
    tree: TreeTensors,
    tokens: Tensor,  # (B, N) long
    draw: Callable[[Tensor], Tensor],  # of a node in each row, (B,) long: the backbone's own token after it, (B,) long
) -> Accepted:
    """`accept_exact`, where a token is drawn only after nodes on the way down: D + 1 draws a row instead of N.

    A draw reads the whole vocabulary several times, and sorts it for top-p.
    """
    parents, below = tree.parents.expand_as(tokens), tree.depths > 0
    reached, node = ~below.expand_as(tokens), tokens.new_zeros(len(tokens))  # nodes of one depth; several if a path is repeated
    for _ in range(tree.lineage.shape[2]):
        bonus = draw(node)
        children = reached.gather(1, parents) & below & (tokens == bonus[:, None])
        found = children.any(-1)  # if not, the walk stays, and would draw the same again
        if tokens.device.type == "cpu" and not found.any():  # a GPU would have to be waited for
            break
        reached = children.where(found[:, None], reached)
        node = children.int().argmax(-1).where(found, node)
    return _accepted(tree, node, bonus)


def accept_typical(
    tree: TreeTensors,
    tokens: Tensor,  # (B, N) long
    scores: Tensor,  # (B, N, V) float32: the backbone's logits after temperature and processors
    thresholds: TypicalAcceptance,
) -> Accepted:
    """Descend to every child that is typical of the backbone; the longest path wins, then the likeliest.

    Not lossless, hence opt-in. The root is the backbone's argmax and always accepted (paper 2.3.1).
    """
    log_p = scores.log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)  # (B, N)
    # Medusa 2.3.1: p > min(epsilon, delta * exp(-H)), both at the parent
    threshold = (thresholds.delta * torch.exp(-entropy)).clamp(max=thresholds.epsilon)
    parents = tree.parents.expand_as(tokens)
    own = log_p[torch.arange(len(tokens), device=tokens.device)[:, None], parents, tokens]  # (B, N)
    reachable = _reachable(tree, own.exp() > threshold.gather(1, parents))
    depth = reachable * (tree.depths + 1)
    deepest = depth == depth.amax(-1, keepdim=True)
    own = own.masked_fill(tree.depths == 0, 0.0).clamp(min=-1e4)  # finite: -inf times 0 is NaN
    likelihood = (tree.ancestors.to(own.dtype) @ own[..., None]).squeeze(-1)
    node = likelihood.masked_fill(~deepest, -torch.inf).argmax(-1)
    return _accepted(tree, node, likeliest(scores).gather(1, node[:, None]).squeeze(1))


def _reachable(
    tree: TreeTensors,
    accepted: Tensor,  # (B, N) bool: the node may follow its parent; the root's entry is ignored
) -> Tensor:  # (B, N) bool: the node and all its ancestors are accepted
    accepted = accepted | (tree.depths == 0)
    return (accepted[:, None, :] | ~tree.ancestors).all(-1)


def _accepted(tree: TreeTensors, node: Tensor, bonus: Tensor) -> Accepted:
    rows = torch.arange(len(node), device=node.device)
    path = tree.lineage.expand(len(node), -1, -1)[rows, node]
    return Accepted(node=node, path=path, length=(path >= 0).sum(-1), bonus=bonus)
