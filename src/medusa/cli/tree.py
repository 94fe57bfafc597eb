"""medusa tree: search, build, draw and save candidate trees, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, showing
from medusa.config import option
from medusa.errors import InvalidInput
from medusa.runs.console import note

if TYPE_CHECKING:
    from medusa.trees.files import Tree
    from medusa.trees.static import MedusaTree

AccuraciesOption = Annotated[
    Path | None,
    typer.Option(
        help='JSON file with "accuracies", a list of numbers per head; assumes that heads err independently (paper 2.3.3).'
    ),
]
CalibrationOption = Annotated[
    Path | None, typer.Option(help="calibration.json of `medusa tune`: how often each path of guesses is right.")
]
Chances = Mapping[tuple[int, ...], float]  # how often each path comes true


@dataclass(frozen=True)
class Wanted:
    """The tree to search for or to build, if it is not in a file."""

    nodes: int | None = option(
        None, "Search for the best tree of this size, the root included, by the accuracies given.", least=1
    )
    dense: tuple[int, ...] = option((), "Build a dense tree; one number of guesses per head: --dense 4 --dense 3.", least=1)
    random_dense: int | None = option(None, "Choose a random dense tree of about this size.", least=1)
    num_heads: int = option(5, "Maximum number of heads in a --random-dense tree.", least=1)
    seed: int = option(0, "Seed of --random-dense.")
    preset: str | None = option(None, "A tree for the public Vicuna and Zephyr heads; `list` names them.")

    def tree(self, file: str | None, search: Callable[[int], MedusaTree] | None) -> Tree:
        """The tree of the file, or the one that is described here.

        Args:
            search: searches for the best tree of a size.
        """
        from medusa.trees.files import load_tree, preset
        from medusa.trees.search import random_dense_tree
        from medusa.trees.static import MedusaTree

        if sum(source not in (None, ()) for source in (file, self.nodes, self.dense, self.random_dense, self.preset)) != 1:
            raise InvalidInput("give one tree: a FILE, --nodes N, --dense, --random-dense N or --preset NAME")
        if self.nodes is not None:
            if search is None:
                raise InvalidInput("--nodes needs --accuracies FILE or --calibration FILE to search with; give one of them")
            return search(self.nodes)
        if self.dense:
            return MedusaTree.dense(self.dense)
        if self.random_dense is not None:
            return random_dense_tree(self.random_dense, self.num_heads, self.seed)
        return load_tree(file) if file is not None else preset(self.preset or "")


@common.with_options(Wanted)
def tree_command(
    file: Annotated[str | None, typer.Argument(help="A tree file of any kind.", show_default=False)] = None,
    accuracies: AccuraciesOption = None,
    calibration: CalibrationOption = None,
    draw: Annotated[
        Path | None, typer.Option(help="Draw the tree as in the paper's Figure 6, into this .svg or .png file.")
    ] = None,
    mark: Annotated[
        list[int] | None, typer.Option(min=0, help="Path to mark in the drawing, one rank per head (default: first guesses).")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the tree in this file.")] = None,
    as_json: common.JsonOption = False,
    **options: Any,
) -> None:
    """Search for, build or read a tree; show, draw and save it. --accuracies or --calibration gives its expected gain."""
    from medusa.trees.files import presets, save_tree

    wanted = common.take(Wanted, options)
    if wanted.preset == "list":
        print(json.dumps(presets()) if as_json else "\n".join(f"{name}\n    {heads}" for name, heads in presets().items()))
        return
    search, chances_of = statistics(accuracies, calibration)
    tree = wanted.tree(file, search)
    marked, chances = draw_static(tree, chances_of, draw, mark)
    if output is not None:
        save_tree(tree, output)
    if unknown := sum(not chance for chance in (chances or {}).values()):
        note(f"{unknown} nodes count as 0: their guesses were never right, or the file has no figure for them")
    expected = None if chances is None else 1 + sum(chances.values())
    if as_json:
        print(json.dumps({**tree.to_dict(), "expected_acceptance_length": expected}))
        return
    show_tree(tree, chances, marked)
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures(tree).items() if value is not None)
    print(shown if expected is None else f"{shown}: {expected:.3f} tokens per step expected")


def draw_static(
    tree: Tree, chances_of: Callable[[MedusaTree], Chances] | None, draw: Path | None, mark: Sequence[int] | None
) -> tuple[tuple[int, ...], Chances | None]:
    """Draw a static tree if `draw` is given; returns the marked path, and how often each path comes true. InvalidInput if the
    tree lacks the path to mark, or is to be drawn but is not static."""
    from medusa.trees.draw import draw_tree
    from medusa.trees.static import MedusaTree

    if not isinstance(tree, MedusaTree):
        if draw is not None or mark:
            raise InvalidInput("only a static tree can be drawn: a dynamic one changes at every step, a choice holds several")
        return (), None
    first_guesses = max((path for path in tree.paths if not any(path)), default=(), key=len)
    marked = tuple(mark) if mark else first_guesses
    if marked and marked not in tree.paths:
        raise InvalidInput(f"the tree has no path {list(marked)} to --mark")
    chances = chances_of(tree) if chances_of is not None else None
    if draw is not None:
        draw_tree(tree, draw, chances, marked)
    return marked, chances


def statistics(
    accuracies: Path | None, calibration: Path | None
) -> tuple[Callable[[int], MedusaTree] | None, Callable[[MedusaTree], Chances] | None]:
    """Functions based on the given file: one searches for a tree of a size, one gives how often a tree's paths come true."""
    from medusa.metrics import path_chances
    from medusa.trees.search import search_tree

    if accuracies is not None and calibration is not None:
        raise InvalidInput("give --accuracies or --calibration, not both")
    if accuracies is not None:
        table = read_accuracies(accuracies)
        return lambda nodes: search_tree(table, nodes), lambda tree: path_chances(tree, table)
    if calibration is not None:
        from medusa.trees.calibration import Calibration

        counted = Calibration.load(calibration)
        return counted.search, counted.path_chances
    return None, None


def read_accuracies(file: Path) -> list[list[float]]:
    """The accuracies in a file: [k - 1][i] is how often exactly guess i (0-based) of head k is right."""
    from medusa.runs.files import read_json
    from medusa.trees.search import check_accuracies

    found = read_json(file, InvalidInput)
    if not isinstance(found, dict) or "accuracies" not in found:
        raise InvalidInput(f'{file} holds no accuracies, expected {{"accuracies": [[a_1 of head 1, a_2, …], …]}}')
    check_accuracies(found["accuracies"])
    return found["accuracies"]


def figures(tree: Tree) -> dict[str, Any]:
    """Size, depth, leaves and greatest rank of a tree."""
    from medusa.trees.static import MedusaTree

    if not isinstance(tree, MedusaTree):
        return {"nodes": len(tree), "depth": tree.depth}
    leaves = len(tree) - len(set(tree.parents) - {-1})
    return {"nodes": len(tree), "depth": tree.depth, "leaves": leaves, "max_rank": tree.max_rank if len(tree) > 1 else None}


def show_tree(tree: Tree, chances: Chances | None = None, marked: Sequence[int] = ()) -> None:
    """Print a tree, one level per head, with the leaves of a parent on one line; or the settings of a dynamic tree."""
    from medusa.trees.files import TreeChoice
    from medusa.trees.static import MedusaTree

    if isinstance(tree, MedusaTree):
        out = showing.console()
        path = {tuple(marked[:depth]) for depth in range(1, len(marked) + 1)}
        out.print(_drawn(tree, chances or {}, path, coloured=out.is_terminal))
    elif isinstance(tree, TreeChoice):
        for batch, inner in sorted(tree.trees.items()):
            print(f"from batch size {batch} on:")
            show_tree(inner)
    else:
        showing.print_facts("built anew at every step", tree.to_dict()["dynamic"])


def _drawn(tree: MedusaTree, chances: Chances, marked: set[tuple[int, ...]], coloured: bool) -> Any:
    from rich.text import Text
    from rich.tree import Tree

    def label(path: tuple[int, ...]) -> Text:
        rank = Text(str(path[-1]), style="bold red" if path in marked else "bold")
        return Text.assemble(rank, (f" {chances[path]:.3f}", "dim")) if chances else rank

    parents = {path[:-1] for path in tree.paths}
    legend = ["rank, how often its path comes true"] if chances else []
    legend += ["red: the marked path, by default all first guesses"] if marked and coloured else []
    root = Text.assemble("root", (f" ({'; '.join(legend)})" if legend else "", "dim"))
    branches: dict[tuple[int, ...], Tree] = {(): Tree(root)}
    for (above, inner), group in groupby(tree.paths, key=lambda path: (path[:-1], path in parents)):
        if inner:
            branches.update({path: branches[above].add(label(path)) for path in group})
        else:
            branches[above].add(Text("  ").join(map(label, group)))
    return branches[()]
