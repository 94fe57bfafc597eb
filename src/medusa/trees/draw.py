"""Drawings of trees, in the manner of the paper's Figure 6 (matplotlib, the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.errors import InvalidInput
from medusa.runs.records import make_folder
from medusa.trees.static import MedusaTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
COLUMN, ROW = 0.3, 1.0  # inches a leaf, and a head
WIDEST = 100.0  # inches; in wider trees all is drawn smaller

Path_ = tuple[int, ...]


def draw_tree(
    tree: MedusaTree,
    file: Path,
    chances: Mapping[Path_, float] | None = None,
    mark: Sequence[int] = (),
) -> None:
    """Write a drawing of a tree, its format by the suffix; see `tree_figure`.

    Raises:
        InvalidInput: another suffix than .png and .svg, no matplotlib, a marked path that the tree lacks, or a file that cannot
            be written.
    """
    if file.suffix not in FORMATS:
        raise InvalidInput(f"a drawing is {' or '.join(FORMATS)}, got {file}")
    figure = tree_figure(tree, chances, mark)
    import matplotlib

    make_folder(file.parent)
    try:
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text: smaller, and it can be searched
            figure.savefig(file, dpi=120)
    except OSError as error:
        raise InvalidInput(f"cannot write {file}: {error.strerror}") from None


def tree_figure(tree: MedusaTree, chances: Mapping[Path_, float] | None = None, mark: Sequence[int] = ()) -> Figure:
    """A tree from its root down: a row a head, each node with the rank of its guess.

    Args:
        chances: how often each path comes true; shades the nodes, and stands below them in per cent.
        mark: an accepted path, drawn red.
    """
    try:
        from matplotlib.collections import LineCollection
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidInput("drawings need matplotlib: pip install 'medusa-decoding[plots]'") from None
    marked = [tuple(mark[:depth]) for depth in range(1, len(mark) + 1)]
    if missing := [path for path in marked if path not in tree.paths]:
        raise InvalidInput(f"the tree has no path {list(missing[0])} to mark")

    places = layout(tree)
    columns = 1 + max(x for x, _ in places.values())
    scale = min(1.0, WIDEST / (COLUMN * columns))
    figure = Figure(figsize=(max(5.0, COLUMN * columns * scale + 1.5), ROW * (tree.depth + 1) + 0.5), layout="constrained")
    axes = figure.add_subplot()
    edges = [[places[path[:-1]], places[path]] for path in tree.paths]
    red = [path in marked for path in tree.paths]
    axes.add_collection(
        LineCollection(
            edges,
            colors=["tab:red" if on else "silver" for on in red],
            linewidths=[2.5 * scale if on else 0.8 * scale for on in red],
            zorder=1,
        )
    )
    values = [1.0 if chances is None else chances.get(path, 0.0) for path in tree.paths]
    shade = PowerNorm(0.5, vmin=0.0, vmax=max([*values, 1e-9]))  # square roots: most nodes are unlikely
    nodes = axes.scatter(
        [places[path][0] for path in tree.paths],
        [places[path][1] for path in tree.paths],
        s=240 * scale**2,
        c="whitesmoke" if chances is None else values,
        cmap=None if chances is None else "Blues",
        norm=None if chances is None else shade,
        edgecolors=["tab:red" if on else "grey" for on in red],
        linewidths=scale,
        zorder=2,
    )
    axes.annotate("root", places[()], ha="center", va="center", bbox={"boxstyle": "round", "fc": "white", "ec": "tab:red"})
    for path, value in zip(tree.paths, values, strict=True):
        dark = chances is not None and shade(value) > 0.6
        text: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 3, "in_layout": False}
        axes.annotate(str(path[-1]), places[path], fontsize=8 * scale, color="white" if dark else "black", **text)
        if chances is not None:
            below = f"{100 * value:.1f}"
            text |= {"xytext": (0, -12 * scale), "textcoords": "offset points"}
            text |= {"bbox": {"fc": "white", "ec": "none", "pad": 0.4 * scale}}
            axes.annotate(below, places[path], fontsize=5 * scale, color="dimgrey", **text)
    if chances is not None:
        figure.colorbar(nodes, ax=axes, label="comes true", format=lambda share, _: f"{100 * share:.3g} %", shrink=0.8)
    axes.set_xlim(-0.8, columns - 0.2)
    axes.set_ylim(-tree.depth - 0.4, 0.4)
    axes.set_yticks([-head for head in range(1, tree.depth + 1)], [f"head {head}" for head in range(1, tree.depth + 1)])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    expected = "" if chances is None else f", {1 + sum(values):.2f} tokens a step expected"
    axes.set_title(f"{len(tree)} nodes{expected}", fontsize="medium")
    return figure


def layout(tree: MedusaTree) -> dict[Path_, tuple[float, float]]:
    """Where each path's node lies, the root's () too: leaves side by side from the left, a parent over the middle of its
    children, each head a row lower."""
    across: dict[Path_, float] = {}
    children: dict[Path_, list[Path_]] = {(): []}
    for path in tree.paths:
        children[path[:-1]].append(path)
        children[path] = []
    leaves = {path: place for place, path in enumerate(path for path in children if not children[path])}
    for path in reversed(children):  # children before parents
        below = children[path]
        across[path] = (across[below[0]] + across[below[-1]]) / 2 if below else leaves[path]
    return {path: (across[path], -len(path)) for path in children}
