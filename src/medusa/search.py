"""Tree search: the tree of a given size that should accept the most (paper 2.3.3)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from medusa.errors import InvalidInput
from medusa.tree import MedusaTree


def search_tree(accuracies: Sequence[Sequence[float]], num_nodes: int) -> MedusaTree:
    """Greedily add the node with the greatest product of accuracies along its path.

    A node's product is at most its parent's, so the order of adding is the order of the products and the result is the
    best tree of its size for heads that err independently.

    Args:
        accuracies: [k - 1][i]: how often exactly guess i (0-based) of head k is right.
        num_nodes: size of the tree, the root included; fewer come back where all useful paths are taken.

    >>> search_tree([[0.6, 0.2], [0.5, 0.1]], 4).paths
    ((0,), (0, 0), (1,))
    """
    if num_nodes < 1:
        raise InvalidInput(f"a tree has at least the root, got {num_nodes} nodes")
    for head, row in enumerate(accuracies, 1):
        if not all(0 <= a <= 1 for a in row):
            raise InvalidInput(f"accuracies of head {head} go beyond [0, 1]: {list(row)}")
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
    """The tree of the paths that came true most often: the best of its size on what was counted, whatever heads get right
    together. Beyond the paper, whose search takes heads to err independently: where text repeats itself they do not.

    Args:
        paths: rank paths with how often each came true; that of a beginning is at least that of the whole.
        num_nodes: size of the tree, the root included; fewer come back where fewer paths came true.

    >>> search_joint_tree([((0,), 9), ((0, 0), 8), ((1,), 3), ((0, 1), 1)], 4).paths
    ((0,), (0, 0), (1,))
    """
    if num_nodes < 1:
        raise InvalidInput(f"a tree has at least the root, got {num_nodes} nodes")
    ordered = sorted(((tuple(path), count) for path, count in paths), key=lambda item: (-item[1], len(item[0]), item[0]))
    return MedusaTree([path for path, _ in ordered[: num_nodes - 1]])
