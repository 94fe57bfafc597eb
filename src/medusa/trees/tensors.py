"""Trees as index tensors, their drafters, and their place in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from medusa.trees.history import History


class TreeTensors(NamedTuple):
    """A tree of N nodes (the root included) and depth D as index tensors. b is the batch, or 1 for one tree in all rows."""

    parents: Tensor  # (b, N) long; the root is its own parent
    depths: Tensor  # (b, N) long; the root's is 0
    lineage: Tensor  # (b, N, D + 1) long: the nodes from the root to the node, then -1
    ancestors: Tensor  # (b, N, N) bool: [n, m] is True if m is n or above it

    @property
    def num_nodes(self) -> int:
        return self.parents.shape[1]


def tree_tensors(
    parents: Tensor,  # (b, N) long; the root, node 0, is its own parent
    depth: int,  # D, at least that of the tree
) -> TreeTensors:
    """The index tensors of the trees that the parents describe. No host-device sync."""
    up, ancestors = paths_up(parents, depth)
    depths = ancestors.sum(-1) - 1
    left = depths[..., None] - torch.arange(depth + 1, device=parents.device)  # steps up from the node to each depth
    lineage = up.gather(2, left.clamp(min=0)).where(left >= 0, -1)
    return TreeTensors(parents, depths, lineage, ancestors)


def paths_up(
    parents: Tensor,  # (b, N) long
    depth: int,
) -> tuple[Tensor, Tensor]:
    """The way up from every node (b, N, depth + 1), the root repeated at its end, and the ancestors (b, N, N) bool."""
    at = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    steps = [at]
    for _ in range(depth):
        steps.append(at := parents.gather(1, at))
    up = torch.stack(steps, -1)
    ancestors = torch.zeros(*parents.shape, parents.shape[1], dtype=torch.bool, device=parents.device)
    return up, ancestors.scatter_(2, up, True)


def chain(length: int, device: torch.device | str | None = None) -> TreeTensors:
    """A path of a number of nodes as a tree: how more of a text is read behind the committed tokens."""
    at = torch.arange(length, device=device)
    below = at <= at[:, None]  # [n, m]: m is n or above it
    return TreeTensors((at - 1).clamp(min=0)[None], at[None], at.where(below, -1)[None], below[None])


# Scores along paths: of a depth k (from 0) and paths (B, W, k) long, the k tokens behind the root, (B, W, R) float32: the
# logarithm of p(guess | path), up to a constant that leaves all other tokens as likely as they are from the root alone.
Along = Callable[[int, Tensor], Tensor]


class Guesses(NamedTuple):
    """The likeliest tokens of the first D heads for every row, best first."""

    tokens: Tensor  # (D, B, R) long
    log_p: Tensor | None  # (D, B, R) float32; None if the drafter does not need them
    along: Along | None = None  # their scores along paths, of heads that read them
    noise: Tensor | None = None  # (D, B, R) float32: the token with the greatest sum of log-probability and noise will be drawn


class Draws(NamedTuple):
    """What decides the draws of rows, beside the backbone."""

    keys: Tensor  # (B,) long
    starts: Tensor  # (B,) long: slots of the prompt, padding included
    temperatures: Tensor  # (B,) float32; 0: nothing is drawn


class Frame(NamedTuple):
    """Where a step's trees stand in the cache: at one base for all rows, behind the longest; the mask hides any gap."""

    base: Tensor  # () long: the slot of the root
    lengths: Tensor  # (B,) long: committed slots, padding included
    pads: Tensor  # (B,) long: slots of padding at the left
    visible: int  # slots that attention sees: at least base + N
    draws: Draws | None = None  # None: nothing is drawn, or the trees do not depend on it


class Drafted(NamedTuple):
    """A step's trees, filled by the heads and read by the backbone."""

    tokens: Tensor  # (B, N) long
    tree: TreeTensors
    hidden: Tensor  # (B, N, d)
    logits: Tensor  # (B, N, V): the backbone's


class Drafter(Protocol):
    """What fills the trees of a request with tokens. `MedusaTree` and `DynamicTree` each make one."""

    @property
    def num_nodes(self) -> int: ...  # the most, the root included

    @property
    def num_heads(self) -> int: ...  # number of heads it reads, from the first

    @property
    def ranks(self) -> int: ...  # number of guesses it takes from each head

    @property
    def depth(self) -> int: ...  # of the deepest node that it may place

    @property
    def reads_history(self) -> bool: ...

    @property
    def fixed(self) -> TreeTensors | None: ...  # the tree, if it is the same at every step

    def guess(self, head_logits: Tensor) -> Guesses: ...

    def assemble(self, root: Tensor, guesses: Guesses | None, history: History | None) -> tuple[Tensor, TreeTensors]: ...
