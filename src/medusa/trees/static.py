"""The static tree: which combinations of the heads' guesses are verified together, at every step (paper 2.1.2, 2.3.3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from medusa.errors import CheckpointError, InvalidTree
from medusa.trees.history import History
from medusa.trees.tensors import Guesses, TreeTensors, tree_tensors

Path_ = tuple[int, ...]


class MedusaTree:
    """A prefix-closed set of rank paths. Path (i1, ..., ik) is the guess of rank i1 (0-based) of head 1, then rank i2 of
    head 2, and so on. The root, the backbone's own next token, is implicit: node 0.

    Nodes are numbered in lexicographic order of their paths: parents come before children, and the path of all first
    guesses is nodes 0, 1, 2, ...: the usual outcome is then contiguous in the KV cache, and nothing has to move.

    Raises:
        InvalidTree: a path is empty, repeated, has a negative rank, or its parent is missing.

    >>> tree = MedusaTree([(0,), (1,), (0, 0)])
    >>> len(tree), tree.depth, tree.paths
    (4, 2, ((0,), (0, 0), (1,)))
    """

    def __init__(self, paths: Iterable[Sequence[int]]):
        try:
            given = [tuple(path) for path in paths]
        except TypeError:
            raise InvalidTree("a tree is a list of paths of ranks, such as [(0,), (0, 1)]") from None
        for path in given:
            if not path:
                raise InvalidTree("the root is implicit; remove the empty path")
            if any(not isinstance(rank, int) or isinstance(rank, bool) or rank < 0 for rank in path):
                raise InvalidTree(f"path {list(path)} has a rank that is not an integer of at least 0")
        self.paths: tuple[Path_, ...] = tuple(sorted(set(given)))
        if len(self.paths) != len(given):
            twice = next(path for path in given if given.count(path) > 1)
            raise InvalidTree(f"path {list(twice)} is given twice")
        known = set(self.paths)
        for path in self.paths:
            if len(path) > 1 and path[:-1] not in known:
                raise InvalidTree(f"path {list(path)} lacks its parent {list(path[:-1])}; a tree is prefix-closed")

    @classmethod
    def dense(cls, sizes: Sequence[int]) -> MedusaTree:
        """The Cartesian product of the top sizes[k-1] guesses of every head k (paper 2.1.2).

        >>> len(MedusaTree.dense([2, 3]))
        9
        """
        return cls(
            path for depth in range(1, len(sizes) + 1) for path in itertools.product(*(range(size) for size in sizes[:depth]))
        )

    def __len__(self) -> int:
        return len(self.paths) + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MedusaTree) and self.paths == other.paths

    def __hash__(self) -> int:
        return hash(self.paths)

    def __repr__(self) -> str:
        return f"MedusaTree({len(self)} nodes, depth {self.depth}, up to rank {self.max_rank})"

    @property
    def depth(self) -> int:
        """The length of the longest path, hence the number of heads used; 0 for the root alone."""
        return max(map(len, self.paths), default=0)

    @property
    def max_rank(self) -> int:
        return max(map(max, self.paths), default=-1)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The parent node of every node; -1 for the root."""
        index = {(): 0, **{path: node for node, path in enumerate(self.paths, 1)}}
        return (-1, *(index[path[:-1]] for path in self.paths))

    def check(self, num_heads: int, vocab_size: int) -> None:
        """Raise InvalidTree unless the heads can fill the tree."""
        check_depth(self.depth, num_heads)
        if self.max_rank >= vocab_size:
            raise InvalidTree(f"tree uses rank {self.max_rank}, the vocabulary has {vocab_size} tokens")

    def to_dict(self) -> dict[str, Any]:
        """`{"paths": [[0], [0, 0], ...]}`, as saved."""
        return {"paths": [list(path) for path in self.paths]}

    @classmethod
    def from_dict(cls, found: Any, source: str) -> MedusaTree:
        """The tree in a saved mapping or a bare list of paths; CheckpointError if it holds none."""
        paths = found.get("paths") if isinstance(found, dict) else found
        if not isinstance(paths, list) or not all(isinstance(item, list) for item in paths):
            raise CheckpointError(f"{source} holds no tree; expected {{'paths': [[0], [0, 0], ...]}}")
        return cls(paths)

    def tensors(self, device: torch.device | str | None = None) -> TreeTensors:
        """The tree as index tensors on a device, one for all rows (b = 1)."""
        return tree_tensors(torch.tensor([(0, *self.parents[1:])], device=device), self.depth)

    def drafter(self, device: torch.device | str | None = None) -> StaticDrafter:
        """The drafter that fills the tree during a request on this device."""
        guesses = torch.tensor([(len(path) - 1) * (self.max_rank + 1) + path[-1] for path in self.paths])
        return StaticDrafter(self.tensors(device), guesses.long().to(device), self.depth, self.max_rank + 1)

    def for_batch(self, batch: int) -> MedusaTree:
        """The tree for a batch of this size: itself; see `TreeChoice`."""
        return self


def check_depth(depth: int, num_heads: int) -> None:
    if depth > num_heads:
        remedy = f"pass a shallower tree or train with --num-heads {depth}"
        raise InvalidTree(f"tree needs {depth} heads, there are {num_heads}; {remedy}")


@dataclass(frozen=True)
class StaticDrafter:
    """The same tree at every step: rank i_k of head k along each path."""

    fixed: TreeTensors  # b = 1: the tree of every step
    guesses: Tensor  # (N - 1,) long: (head - 1) * ranks + rank, for every node but the root
    num_heads: int
    ranks: int  # guesses taken from each head
    reads_history = False

    @property
    def num_nodes(self) -> int:
        return self.fixed.num_nodes

    @property
    def depth(self) -> int:
        return self.num_heads

    def guess(
        self,
        head_logits: Tensor,  # (D, B, V)
    ) -> Guesses:
        return Guesses(head_logits.topk(self.ranks, dim=-1).indices, None)

    def assemble(
        self,
        root: Tensor,  # (B,) long
        guesses: Guesses | None,  # None: the tree is its root
        history: History | None = None,
    ) -> tuple[Tensor, TreeTensors]:
        """The token of every node (B, N), and the tree."""
        if guesses is None:
            return root[:, None].clone(), self.fixed  # the state's root changes in place
        tokens = guesses.tokens.transpose(0, 1).flatten(1)  # (B, D * R)
        return torch.cat([root[:, None], tokens[:, self.guesses]], dim=1), self.fixed
