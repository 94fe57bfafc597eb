"""Which tree the rows of a step share: by their number, from the model's tree file."""

from __future__ import annotations

from medusa.trees.dynamic import DynamicTree
from medusa.trees.files import Tree, TreeChoice
from medusa.trees.static import MedusaTree

PATIENCE = 8  # steps that another tree has to be the better one before it is used


class TreeByLoad:
    """Chooses the tree of each step.

    Args:
        tree: the model's; a `TreeChoice` names one for each number of rows, of which some may be plain decoding.
    """

    def __init__(self, tree: Tree):
        self._tree = tree
        self.used = tree.for_batch(1)
        self._waited = 0

    @property
    def all(self) -> list[MedusaTree | DynamicTree]:
        """All trees that it may choose."""
        return list(self._tree.trees.values()) if isinstance(self._tree, TreeChoice) else [self._tree]

    def wanted(self, rows: int) -> MedusaTree | DynamicTree:
        """The best tree for a step of so many rows."""
        return self._tree.for_batch(rows)

    def choose(self, rows: int, new: bool) -> MedusaTree | DynamicTree:
        """The tree for a step of so many rows.

        Args:
            new: no row has been stepped before, so that there is nothing to change from.
        """
        wanted = self.wanted(rows)
        self._waited = 0 if wanted == self.used else self._waited + 1
        if new or self._waited >= PATIENCE:
            self.used, self._waited = wanted, 0
        return self.used
