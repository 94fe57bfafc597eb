"""medusa inspect: what a model folder, heads or a tree file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medusa.cli import common
from medusa.cli.tree import figures, show_tree


def inspect_command(
    path: Annotated[str, typer.Argument(help="A folder, file or hub id with heads of any format, a tree file, or `embedded`.")],
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Say what is there: heads, their format, sizes and parameters, and the tree."""
    from medusa.checkpoints import open_checkpoint
    from medusa.config import TREE_FILE
    from medusa.hub import find_heads
    from medusa.trees import Tree, load_tree

    file = Path(path)
    record: dict = {}
    if file.is_file() and file.suffix == ".json" and not file.name.endswith(".index.json"):
        tree: Tree | None = load_tree(file)
    else:
        source = file if file.is_file() else find_heads(common.at(path, revision))
        found = open_checkpoint(source)
        record["heads"] = {
            "format": found.format,
            "file": found.source.name,
            "num_heads": found.num_heads,
            "num_layers": found.num_layers,
            "hidden_size": found.hidden_size,
            "vocab_size": found.vocab_size,
            "shared_lm_head": found.shared_lm_head,
            "lm_head_bias": found.lm_head_bias,
            "tied_blocks": found.tied_blocks,
            "parameters": sum(tensor.numel() for tensor in found.tensors.values()),
            "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()})),
            "base_model": found.base_model,
            "notes": list(found.notes),
        }
        beside = found.source.parent / TREE_FILE
        tree = load_tree(beside) if beside.is_file() else None
    if tree is not None:
        record["tree"] = figures(tree)
    if as_json:
        print(json.dumps(record))
        return
    for part, facts in record.items():
        print(f"{part}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    if tree is not None:
        show_tree(tree)
