"""Graphs: compiled steps for the shapes of a pool, made one by one while there is nothing to decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch

from medusa.batch.state import Decodable, visible_slots
from medusa.serving.slots import Slots
from medusa.serving.trees import PLAIN, TreeByLoad
from medusa.trees.dynamic import DynamicTree
from medusa.trees.static import MedusaTree
from medusa.trees.tensors import Drafter, Frame

Shape = tuple[int, MedusaTree | DynamicTree, int]  # number of rows, tree, number of visible slots


class Graphs:
    """The compiled steps of a model that are ready. Until one is, its steps run uncompiled.

    Args:
        model: a `MedusaModel`.
        pool: the slots that it decodes in.
        drafters: those of the trees that the engine chooses from.
    """

    def __init__(self, model: Any, pool: Slots, by_load: TreeByLoad, drafters: Mapping[MedusaTree | DynamicTree, Drafter]):
        self.model: Decodable = model.compiled
        self._pool, self._drafters = pool, {PLAIN: PLAIN.drafter(model.device), **drafters}
        self._ready: set[Shape] = set()
        self._left: deque[Shape] = deque()
        widths = sorted({self.width(rows) for rows in range(1, pool.number + 1)})
        seen = sorted({visible_slots(length, pool.capacity) for length in range(1, pool.capacity + 1)})
        for fewer, width in zip([0, *widths], widths, strict=False):
            trees = dict.fromkeys(t for rows in range(fewer + 1, width + 1) for t in by_load.candidates(rows))
            if width == 1:  # what a tree is compared with
                trees[PLAIN] = None
            self._left += [(w, t, v) for w, t, v in product([width], trees, seen) if v >= self._drafters[t].num_nodes]

    @property
    def left(self) -> int:
        """The number of graphs that are still to be made."""
        return len(self._left)

    def width(self, rows: int) -> int:
        """The number of rows of the graph that steps a number of rows."""
        return min(self._pool.number, 1 << (rows - 1).bit_length())

    def ready(self, rows: int, tree: MedusaTree | DynamicTree, base: int) -> bool:
        """Whether there is a graph for a step."""
        if tree not in self._drafters:  # a request's own
            return False
        visible = visible_slots(base + self._drafters[tree].num_nodes, self._pool.capacity)
        return (self.width(rows), tree, visible) in self._ready

    def make(self) -> None:
        """Make the next graph: a step of slots without requests, whose result is not used."""
        width, tree, visible = self._left[0]
        drafter = self._drafters[tree]
        base = visible - drafter.num_nodes
        part = self._pool.part(0, width, drafter)
        frame = Frame(torch.full((), base, device=part.root.device), part.lengths, part.pads, visible, part.draws)
        try:
            self.model.draft_and_verify(part.root, part.hidden, drafter, part.history, frame, part.cache)
            self._ready.add((width, tree, visible))
        finally:  # a shape that fails is not tried again
            self._left.popleft()
            self._pool.stepped(0, width, base)
