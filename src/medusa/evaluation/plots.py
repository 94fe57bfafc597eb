"""The experiments' figures, in the manner of the paper's (matplotlib, the extra `plots`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa.data.prompt_sets import OVERALL
from medusa.errors import InvalidInput
from medusa.evaluation.catalog import Experiment
from medusa.evaluation.report import LIKELIHOOD

FORMATS = ("png", "svg")
# What a column's figure is: a number, or one with its interval.
VALUES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tokens/s": lambda f: f["tokens_per_second"],
    "vs generate": lambda f: f["speedup_vs_generate"],
    "tokens a step": lambda f: f["acceleration_rate"],
    "nats a token": lambda f: f["quality"][LIKELIHOOD],
    "repeated 8-grams": lambda f: f["repeated_8grams"],
    "distinct-2": lambda f: f["quality"]["distinct_2"],
}


def save_figure(record: dict[str, Any], experiment: Experiment, folder: Path) -> None:
    """Write `figure.png` and `figure.svg`: a panel for each of the experiment's, against its axis or as bars by category.

    Raises:
        InvalidInput: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidInput("the figure needs matplotlib: pip install 'medusa-decoding[plots]'") from None
    columns = min(2, len(experiment.panels))
    rows = -(-len(experiment.panels) // columns)
    drawing = Figure(figsize=(6.0 * columns, 3.8 * rows), layout="constrained")
    grid = drawing.subplots(rows, columns, squeeze=False).flatten()
    for panel, axes in zip(experiment.panels, grid, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel(panel)
        if experiment.axis:
            _curves(axes, record, VALUES[panel])
            axes.set_xlabel(experiment.axis)
        else:
            _bars(axes, record, VALUES[panel])
    if experiment.axis == "nodes":
        for axes in grid:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
    names = grid[0].get_legend_handles_labels()
    drawing.legend(*names, loc="outside lower center", ncols=min(6, len(names[0])), fontsize="small", frameon=False)
    for suffix in FORMATS:
        drawing.savefig(folder / f"figure.{suffix}", dpi=120, metadata={"Date": None} if suffix == "svg" else None)


def _curves(axes: Any, record: dict[str, Any], value: Callable[[dict[str, Any]], Any]) -> None:
    """A line with its intervals for each series, dots alone where one has several values at a place; baselines are dotted."""
    places = record["contenders"]
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for name, parts in record["decoders"].items():
        if places[name]["at"] is not None:
            series.setdefault(places[name]["series"], []).append((places[name]["at"], *_spread(value(parts[OVERALL]))))
    for name, points in series.items():
        points.sort()
        at, levels = [point[0] for point in points], [point[1] for point in points]
        joined = len(set(at)) == len(at)
        (line,) = axes.plot(at, levels, "o-" if joined else "o", markersize=4, linewidth=1, label=name)
        if joined:
            low, high = [level - below for _, level, below, _ in points], [level + above for _, level, _, above in points]
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    for number, (name, parts) in enumerate(record["decoders"].items()):
        if places[name]["at"] is None:
            level, colour = _spread(value(parts[OVERALL]))[0], f"C{len(series) + number}"
            axes.axhline(level, color=colour, linestyle=":", linewidth=1.2, label=name)


def _bars(axes: Any, record: dict[str, Any], value: Callable[[dict[str, Any]], Any]) -> None:
    """Bars side by side for every decoder, in all and in every category."""
    found = record["decoders"]
    parts = list(next(iter(found.values())))
    parts = parts if len(parts) > 2 else parts[:1]  # one category is all there is
    width = 0.85 / len(found)
    for place, (name, figures) in enumerate(found.items()):
        middle, below, above = zip(*(_spread(value(figures[part])) for part in parts), strict=True)
        at = [n + (place - (len(found) - 1) / 2) * width for n in range(len(parts))]
        axes.bar(at, middle, width, yerr=(below, above), label=name, capsize=2, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(parts)), parts, rotation=20 if len(parts) > 5 else 0)


def _spread(figure: Any) -> tuple[float, float, float]:
    """A figure, and how far its interval reaches below and above it."""
    if not isinstance(figure, dict):
        return figure, 0.0, 0.0
    value, low, high = figure["value"], figure["low"], figure["high"]
    return (value, 0.0, 0.0) if low is None else (value, max(0.0, value - low), max(0.0, high - value))
