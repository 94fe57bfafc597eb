"""Drawings of trees, in the manner of the paper's Figure 6 (matplotlib, the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.errors import InvalidInput
from medusa.runs.plotting import new_figure, save_plot
from medusa.trees.static import MedusaTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, ROW = 0.3, 1.0  # inches per leaf, and per head
WIDEST = 100.0  # inches; wider trees are drawn smaller

Path_ = tuple[int, ...]
Places = dict[Path_, tuple[float, float]]


def draw_tree(tree: MedusaTree, file: Path, chances: Mapping[Path_, float] | None = None, mark: Sequence[int] = ()) -> None:
    """Write a drawing of a tree, see `tree_figure`, in the format of the file's suffix; InvalidInput for another than .png and
    .svg."""
    save_plot(tree_figure(tree, chances, mark), file, text=True)


def tree_figure(tree: MedusaTree, chances: Mapping[Path_, float] | None = None, mark: Sequence[int] = ()) -> Figure:
    """A tree from its root down: a row for each head, each node with the rank of its guess.

    How often each path comes true (`chances`) shades the nodes, and stands below them in per cent; an accepted path (`mark`) is
    red. InvalidInput if the tree lacks it.
    """
    marked = [tuple(mark[:depth]) for depth in range(1, len(mark) + 1)]
    if missing := [path for path in marked if path not in tree.paths]:
        raise InvalidInput(f"the tree has no path {list(missing[0])} to mark")
    places = layout(tree)
    columns = 1 + max(x for x, _ in places.values())
    scale = min(1.0, WIDEST / (COLUMN * columns))
    figure = new_figure(max(5.0, COLUMN * columns * scale + 1.5), ROW * (tree.depth + 1) + 0.5)
    axes = figure.add_subplot()
    red = [path in marked for path in tree.paths]
    _draw_edges(axes, tree, places, red, scale)
    nodes, dark = _draw_nodes(axes, tree, places, red, scale, chances)
    axes.annotate("root", places[()], ha="center", va="center", bbox={"boxstyle": "round", "fc": "white", "ec": "tab:red"})
    _label_nodes(axes, tree, places, dark, scale, chances)
    if chances is not None:
        figure.colorbar(nodes, ax=axes, label="comes true", format=lambda share, _: f"{100 * share:.3g} %", shrink=0.8)
    axes.set_xlim(-0.8, columns - 0.2)
    axes.set_ylim(-tree.depth - 0.4, 0.4)
    axes.set_yticks([-head for head in range(1, tree.depth + 1)], [f"head {head}" for head in range(1, tree.depth + 1)])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    expected = "" if chances is None else f", {1 + sum(chances.get(p, 0.0) for p in tree.paths):.2f} tokens per step expected"
    axes.set_title(f"{len(tree)} nodes{expected}", fontsize="medium")
    return figure


def _draw_edges(axes: Axes, tree: MedusaTree, places: Places, red: Sequence[bool], scale: float) -> None:
    from matplotlib.collections import LineCollection

    edges = [[places[path[:-1]], places[path]] for path in tree.paths]
    colors = ["tab:red" if on else "silver" for on in red]
    axes.add_collection(LineCollection(edges, colors=colors, linewidths=[scale * (2.5 if on else 0.8) for on in red], zorder=1))


def _draw_nodes(
    axes: Axes, tree: MedusaTree, places: Places, red: Sequence[bool], scale: float, chances: Mapping[Path_, float] | None
) -> tuple[Any, list[bool]]:
    """Draw the nodes, shaded by chance; returns them as drawn, and for each whether it is too dark for black text."""
    from matplotlib.colors import PowerNorm

    values = [0.0 if chances is None else chances.get(path, 0.0) for path in tree.paths]
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
    return nodes, [shade(value) > 0.6 for value in values]


def _label_nodes(
    axes: Axes, tree: MedusaTree, places: Places, dark: Sequence[bool], scale: float, chances: Mapping[Path_, float] | None
) -> None:
    """Write the rank on every node, and below it its chance in per cent."""
    style: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 3, "in_layout": False}
    box = {"fc": "white", "ec": "none", "pad": 0.4 * scale}
    below: dict[str, Any] = {"xytext": (0, -12 * scale), "textcoords": "offset points", "bbox": box}
    below |= {"fontsize": 5 * scale, "color": "dimgrey"}
    for path, on_dark in zip(tree.paths, dark, strict=True):
        axes.annotate(str(path[-1]), places[path], fontsize=8 * scale, color="white" if on_dark else "black", **style)
        if chances is not None:
            axes.annotate(f"{100 * chances.get(path, 0.0):.1f}", places[path], **style, **below)


def layout(tree: MedusaTree) -> Places:
    """The place of each path's node, the root's () included: leaves side by side from the left, a parent above the middle of
    its children, each head one row lower."""
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
