"""Tree search: the tree of a given size that should accept the most tokens (paper 2.3.3)."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from typing import Any

from medusa.errors import InvalidInput
from medusa.trees.static import MedusaTree

USUAL_RANKS = 10  # guesses of each head in a random tree, as in the reference project's trees
ROUNDING = 0.01  # by how much the accuracies of a head may exceed 1 in total


def search_tree(accuracies: Sequence[Sequence[float]], num_nodes: int) -> MedusaTree:
    """Greedily add the node with the greatest product of accuracies along its path.

    A node's product is at most its parent's, so the order of adding is the order of the products and the result is the
    best tree of its size for heads that err independently.

    Args:
        accuracies: [k - 1][i]: how often exactly guess i (0-based) of head k is right.
        num_nodes: size of the tree, the root included; the result is smaller if all useful paths are taken.

    Raises:
        InvalidInput: no node, or accuracies that cannot be; see `check_accuracies`.

    >>> search_tree([[0.6, 0.2], [0.5, 0.1]], 4).paths
    ((0,), (0, 0), (1,))
    """
    if num_nodes < 1:
        raise InvalidInput(f"a tree has at least the root, got {num_nodes} nodes")
    check_accuracies(accuracies)
    # Ranks by falling accuracy, so that a path's best unused sibling is the next in its head's order.
    order = [sorted(range(len(row)), key=[-a for a in row].__getitem__) for row in accuracies]

    def candidate(prefix: tuple[int, ...], value: float, place: int):
        head = len(prefix)
        if head >= len(order) or place >= len(order[head]):
            return None
        rank = order[head][place]
        product = value * accuracies[head][rank]
        return (-product, (*prefix, rank), prefix, value, place) if product > 0 else None

    frontier = [item for item in [candidate((), 1.0, 0)] if item]
    paths: list[tuple[int, ...]] = []
    while frontier and len(paths) < num_nodes - 1:
        negative, path, prefix, value, place = heapq.heappop(frontier)
        paths.append(path)
        for item in (candidate(path, -negative, 0), candidate(prefix, value, place + 1)):
            if item:
                heapq.heappush(frontier, item)
    return MedusaTree(paths)


def search_joint_tree(paths: Iterable[tuple[Sequence[int], int]], num_nodes: int) -> MedusaTree:
    """The tree of the paths that came true most often, the best of its size on the counted places.

    This goes beyond the paper, whose search assumes that heads err independently, which they do not in repetitive text.

    Args:
        paths: rank paths with how often each came true; a prefix came true at least as often as the whole path.
        num_nodes: size of the tree, the root included; the result is smaller if fewer paths came true.

    >>> search_joint_tree([((0,), 9), ((0, 0), 8), ((1,), 3), ((0, 1), 1)], 4).paths
    ((0,), (0, 0), (1,))
    """
    if num_nodes < 1:
        raise InvalidInput(f"a tree has at least the root, got {num_nodes} nodes")
    ordered = sorted(((tuple(path), count) for path, count in paths), key=lambda item: (-item[1], len(item[0]), item[0]))
    return MedusaTree([path for path, _ in ordered[: num_nodes - 1]])


def check_accuracies(accuracies: Any) -> None:
    """Raise InvalidInput unless every head, and there is at least one, has accuracies in [0, 1] that add up to at most 1, since
    at most one guess of a head is right."""
    if not _filled_list(accuracies):
        raise InvalidInput(f"accuracies are {_short(accuracies)}, expected a list for every head: [[a_1, a_2, …], …]")
    for head, row in enumerate(accuracies, 1):
        if not _filled_list(row):
            raise InvalidInput(f"accuracies of head {head} are {_short(row)}, expected a list of numbers, best guess first")
        for a in row:
            if not isinstance(a, int | float) or isinstance(a, bool) or not 0 <= a <= 1:
                raise InvalidInput(f"an accuracy of head {head} is {_short(a)}, expected a number from 0 to 1")
        if sum(row) > 1 + ROUNDING:
            raise InvalidInput(
                f"accuracies of head {head} add up to {sum(row):.3g}, expected at most 1: the i-th is how often exactly "
                "guess i is right, not how often one of the first i is"
            )


def _filled_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def random_dense_tree(num_nodes: int, num_heads: int, seed: int) -> MedusaTree:
    """A dense tree with randomly drawn top-s_k, the baseline of the paper's Figure 4 (2.1.2, 3.3.1).

    It is drawn uniformly from all Cartesian trees of up to num_heads heads whose size is within a sixteenth of num_nodes; few
    or odd trees have exactly that size, such as those of 32 nodes, which take one guess of the first head or all nodes from it.
    No head gives more than its best ten guesses, unless no such tree is large enough.

    Args:
        num_nodes: size of the tree, the root included.

    >>> random_dense_tree(64, 4, seed=0) == random_dense_tree(64, 4, seed=0)
    True
    """
    if num_nodes < 1 or num_heads < 1:
        raise InvalidInput(f"a dense tree has at least a node and a head, got {num_nodes} and {num_heads}")
    near = range(num_nodes - num_nodes // 16, num_nodes + num_nodes // 16 + 1)

    def settings(ranks: int) -> list[tuple[int, ...]]:
        return [sizes for nodes in near for sizes in _dense_settings(nodes - 1, num_heads, ranks)]

    return MedusaTree.dense(random.Random(seed).choice(settings(USUAL_RANKS) or settings(num_nodes)))


def _dense_settings(nodes: int, heads: int, ranks: int) -> list[tuple[int, ...]]:
    """All top-s_k of at most `heads` heads and `ranks` ranks with `nodes` nodes below the root: s_1 (1 + s_2 (1 + …))."""
    if nodes == 0:
        return [()]
    if heads == 0:
        return []
    return [
        (size, *rest)
        for size in range(1, min(nodes, ranks) + 1)
        if nodes % size == 0
        for rest in _dense_settings(nodes // size - 1, heads - 1, ranks)
    ]
