"""Plots of benches and experiments, in the manner of the paper's (matplotlib, the extra `plots`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from medusa.data.prompt_sets import OVERALL
from medusa.evaluation.report import COLUMNS, GENERATE, PLAIN, ByDecoder, Column, shown_categories
from medusa.runs.plotting import new_figure, svg_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from medusa.evaluation.catalog import Experiment


def speed_plots(found: ByDecoder) -> list[str]:
    """Bars of tokens per second and of speedups by category, as SVG."""
    plots = [_bars_plot(found, "tokens/s", "tokens per second, prefill included")]
    base = PLAIN if PLAIN in found else GENERATE
    if base in found and not set(found) <= {PLAIN, GENERATE}:
        label = f"speedup over {'our plain loop' if base == PLAIN else 'generate'}"
        plots.append(_bars_plot(found, f"vs {base}", label, without=(PLAIN, GENERATE), level=1.0))
    return plots


def lengths_plot(found: ByDecoder) -> str:
    """The share of steps by the number of tokens that they emitted, a line per decoder, as SVG."""
    figure = new_figure(7.0, 4.0)
    axes = _axes(figure)
    for name, categories in found.items():
        steps = {int(length): count for length, count in categories[OVERALL]["acceptance_lengths"].items()}
        lengths = range(1, max(steps) + 1)
        axes.plot(lengths, [steps.get(n, 0) / sum(steps.values()) for n in lengths], marker="o", markersize=4, label=name)
    axes.set_xlabel("tokens emitted by a step")
    axes.set_ylabel("share of steps")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg_with_legend(figure, axes)


def experiment_figure(record: dict[str, Any], experiment: Experiment) -> Figure:
    """A panel for each of the experiment's columns, against its axis or as bars by category."""
    columns = min(2, len(experiment.panels))
    rows = -(-len(experiment.panels) // columns)
    figure = new_figure(6.0 * columns, 3.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, axes in zip(experiment.panels, grid, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel(panel)
        if experiment.axis:
            _draw_curves(axes, record, COLUMNS[panel])
            axes.set_xlabel(experiment.axis)
        else:
            found = record["decoders"]
            _draw_bars(axes, found, shown_categories(found), COLUMNS[panel], list(found))
    if experiment.axis == "nodes":
        for axes in grid:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
    names = grid[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=min(6, len(names[0])), fontsize="small", frameon=False)
    return figure


def _bars_plot(
    found: ByDecoder,
    column: str,
    label: str,
    without: Collection[str] = (),  # decoders to leave out
    level: float | None = None,  # a line to compare with
) -> str:
    shown = {name: categories for name, categories in found.items() if name not in without}
    categories = shown_categories(found)
    figure = new_figure(min(16.0, max(6.0, 1.2 + 0.28 * len(categories) * (len(shown) + 1))), 4.0)
    axes = _axes(figure)
    _draw_bars(axes, shown, categories, COLUMNS[column], list(found))
    axes.set_ylabel(label)
    if level is not None:
        axes.axhline(level, color="grey", linewidth=0.8, linestyle="--")
    return _svg_with_legend(figure, axes)


def _draw_bars(axes: Any, found: ByDecoder, categories: Sequence[str], column: Column, names: Sequence[str]) -> None:
    """Draw a bar with its interval for every decoder in every category, in its colour on all plots: by its place in `names`."""
    width = 0.85 / len(found)
    for place, (name, figures) in enumerate(found.items()):
        middle, below, above = zip(*(_spread(column, figures[category]) for category in categories), strict=True)
        at = [n + (place - (len(found) - 1) / 2) * width for n in range(len(categories))]
        style = {"label": name, "color": f"C{names.index(name)}", "capsize": 2, "error_kw": {"linewidth": 0.8}}
        axes.bar(at, middle, width, yerr=(below, above), **style)
    axes.set_xticks(range(len(categories)), categories, rotation=20 if len(categories) > 5 else 0)


def _draw_curves(axes: Any, record: dict[str, Any], column: Column) -> None:
    """Draw a line with its interval for each series, dots if a series has several values at a place; baselines are dotted."""
    entries = record["entries"]
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    baselines: dict[str, float] = {}
    for name, categories in record["decoders"].items():
        spread = _spread(column, categories[OVERALL])
        if entries[name]["at"] is None:
            baselines[name] = spread[0]
        else:
            series.setdefault(entries[name]["series"], []).append((entries[name]["at"], *spread))
    for name, points in series.items():
        points.sort()
        at, levels = [point[0] for point in points], [point[1] for point in points]
        joined = len(set(at)) == len(at)
        (line,) = axes.plot(at, levels, "o-" if joined else "o", markersize=4, linewidth=1, label=name)
        if joined:
            low, high = [level - below for _, level, below, _ in points], [level + above for _, level, _, above in points]
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    for number, (name, level) in enumerate(baselines.items(), len(series)):
        axes.axhline(level, color=f"C{number}", linestyle=":", linewidth=1.2, label=name)


def _spread(column: Column, figures: dict[str, Any]) -> tuple[float, float, float]:
    figure = column.value(figures)
    if not isinstance(figure, dict):
        return figure, 0.0, 0.0
    value, low, high = figure["value"], figure["low"], figure["high"]
    return (value, 0.0, 0.0) if low is None else (value, max(0.0, value - low), max(0.0, high - value))


def _axes(figure: Figure) -> Any:
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _svg_with_legend(figure: Figure, axes: Any) -> str:
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg_of(figure)
