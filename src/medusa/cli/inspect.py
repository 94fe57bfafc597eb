"""medusa inspect: what a model folder, heads or a tree file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medusa.cli import common
from medusa.cli.tree import figures, show_tree
from medusa.errors import InvalidInput


def inspect_command(
    path: Annotated[str, typer.Argument(help="A folder or hub id with heads, a tree file, or `embedded`.")],
    as_json: common.JsonOption = False,
) -> None:
    """Say what is there: heads, their sizes and parameters, and the tree."""
    from medusa.config import TREE_FILE
    from medusa.heads import load_heads
    from medusa.hub import local_folder
    from medusa.trees import Tree, load_tree

    file = Path(path)
    record: dict = {}
    if file.is_file() and file.suffix != ".json":
        raise InvalidInput(f"{path} is no tree file; give the folder that the heads are in")
    if file.is_file():
        tree: Tree | None = load_tree(file)
    else:
        folder = local_folder(common.model_folder(path))
        heads = load_heads(folder)
        config = heads.config
        record["heads"] = {
            "num_heads": len(heads),
            "num_layers": heads.num_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "shared_lm_head": config.medusa_shared_lm_head,
            "parameters": sum(p.numel() for p in heads.parameters()),
            "dtype": str(next(heads.parameters()).dtype).removeprefix("torch."),
            "base_model": config.base_model_name_or_path,
        }
        tree = load_tree(folder / TREE_FILE) if (folder / TREE_FILE).is_file() else None
    if tree is not None:
        record["tree"] = figures(tree)
    if as_json:
        print(json.dumps(record))
        return
    for part, facts in record.items():
        print(f"{part}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    if tree is not None:
        show_tree(tree)
