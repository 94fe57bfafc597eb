"""Tree files and presets, and the kinds of tree that a model can have: static, dynamic, or one for each batch size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa.errors import CheckpointError, InvalidInput, InvalidTree
from medusa.runs.files import read_json, write_text
from medusa.trees.dynamic import DynamicTree
from medusa.trees.static import MedusaTree


@dataclasses.dataclass(frozen=True)
class TreeChoice:
    """A tree for each batch size: larger batches leave less arithmetic to spare and want smaller trees.

    Args:
        trees: trees by batch size; a batch takes the tree of the largest size not above its own.

    >>> choice = TreeChoice({1: MedusaTree.dense([2, 2]), 8: MedusaTree([])})
    >>> [len(choice.for_batch(batch)) for batch in (1, 7, 8, 100)]
    [7, 7, 1, 1]
    """

    trees: Mapping[int, MedusaTree | DynamicTree]

    def __post_init__(self) -> None:
        if not self.trees or not all(type(batch) is int and batch >= 1 for batch in self.trees):
            raise InvalidTree(f"a choice of trees is by batch sizes of at least 1, got {sorted(self.trees)}")

    def __len__(self) -> int:
        return max(map(len, self.trees.values()))

    @property
    def depth(self) -> int:
        """The number of heads that the deepest tree uses."""
        return max(tree.depth for tree in self.trees.values())

    def check(self, num_heads: int, vocab_size: int) -> None:
        """Raise InvalidTree unless the heads can fill every tree."""
        for tree in self.trees.values():
            tree.check(num_heads, vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """`{"batches": {"1": …}}`, as saved."""
        return {"batches": {str(batch): tree.to_dict() for batch, tree in sorted(self.trees.items())}}

    def for_batch(self, batch: int) -> MedusaTree | DynamicTree:
        """The tree for a batch of this size."""
        return self.trees[max((size for size in self.trees if size <= batch), default=min(self.trees))]


Tree = MedusaTree | DynamicTree | TreeChoice


def save_tree(tree: Tree, path: str | Path) -> None:
    """Write a tree file; it is complete or absent. CheckpointError if it cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), json.dumps(tree.to_dict()) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None


def _presets() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "presets.json").read_text(encoding="utf-8"))


def presets() -> dict[str, str]:
    """The names of the trees in the package, each with the heads it was made for."""
    return {name: found["for"] for name, found in _presets().items()}


def preset(name: str) -> MedusaTree:
    """A tree of the reference project, from the package: 64 nodes with the root.

    Raises:
        InvalidInput: no preset has this name.

    >>> preset("vicuna_7b_stage2")
    MedusaTree(64 nodes, depth 4, up to rank 9)
    """
    known = _presets()
    if name not in known:
        raise InvalidInput(f"no tree is called {name!r}; there are {', '.join(known)}")
    return MedusaTree.from_dict(known[name], name)


def load_tree(path: str | Path) -> Tree:
    """Read a tree file of any kind or a bare JSON list of paths; without such a file, take the preset of this name.

    Raises:
        CheckpointError: the file is missing or holds no tree.
        InvalidInput: neither a file nor a preset has that name.
        InvalidTree: its tree is malformed.
        ConfigError: a dynamic tree with an unknown key, or a value of the wrong type.
    """
    if not Path(path).exists():
        if Path(path).stem == str(path):  # a bare name
            return preset(str(path))
        raise CheckpointError(f"no tree file {path}")
    if not Path(path).is_file():
        raise CheckpointError(f"cannot read the tree file {path}: not a file")
    return tree_from(read_json(path, CheckpointError), str(path))


def tree_from(found: Any, source: str) -> Tree:
    """The tree that parsed JSON describes; the errors of `load_tree` name its source."""
    if isinstance(found, dict) and isinstance(found.get("dynamic"), dict):
        return DynamicTree.from_dict(found, source)
    if isinstance(found, dict) and isinstance(found.get("batches"), dict):
        trees = {}
        for batch, inner in found["batches"].items():
            tree = tree_from(inner, source)
            if not batch.isdecimal() or isinstance(tree, TreeChoice):
                raise CheckpointError(f"{source}: batches are numbers with a tree each, got {batch!r}")
            trees[int(batch)] = tree
        return TreeChoice(trees)
    return MedusaTree.from_dict(found, source)
