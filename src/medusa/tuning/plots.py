"""Plots of a tuning: the curves over sizes with the choice marked (the paper's Figure 4), and the calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medusa.runs.plotting import new_figure, save_plot
from medusa.trees.calibration import Calibration
from medusa.tuning.choice import Choices
from medusa.tuning.options import Option


def draw_choices(choices: Choices, path: Path) -> None:
    """Draw all options for every batch size, in the format of the file's suffix."""
    batches = sorted(choices.chosen)
    figure = new_figure(12, 3.6 * len(batches))
    for row, batch in zip(figure.subplots(len(batches), 3, squeeze=False), batches, strict=True):
        _draw_batch(row, choices, batch)
    save_plot(figure, path)


def _draw_batch(row: Sequence[Any], choices: Choices, batch: int) -> None:
    """Draw tokens per step, overhead and speedup against nodes, a line for each kind."""
    panels: dict[str, Callable[[Option], float]] = {
        "tokens per step": lambda option: option.acceleration_rate,
        "overhead": lambda option: option.overhead(choices.plain, batch),
        f"speedup, batch {batch}": lambda option: option.speedup(choices.plain, batch),
    }
    choice = choices.chosen[batch]
    for axes, (label, value) in zip(row, panels.items(), strict=True):
        for kind in dict.fromkeys(option.kind for option in choices.options):
            options = sorted((o for o in choices.options if o.kind == kind), key=lambda option: len(option.tree))
            sizes = [len(option.tree) for option in options]
            axes.plot(sizes, list(map(value, options)), marker="o", markersize=3, label=kind)
            if label == "tokens per step":
                low, high = zip(*(option.interval for option in options), strict=True)
                axes.fill_between(sizes, low, high, alpha=0.15)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.plot(len(choice.tree), value(choice), marker="*", markersize=14, color="black", label=f"chosen: {choice.name}")
        axes.set(xlabel="nodes", ylabel=label)
        axes.set_xscale("log", base=2)
    row[0].legend(fontsize="small")


def draw_calibration(calibration: Calibration, path: Path) -> None:
    """Draw how often each guess of each head is right, with its interval, and how often first guesses are right if those of all
    earlier heads were: the two would agree if heads erred independently."""
    figure = new_figure(9, 3.6)
    guesses, firsts = figure.subplots(1, 2)
    rows = list(zip(calibration.accuracies, calibration.intervals(), strict=True))
    for head, (accuracies, intervals) in enumerate(rows, 1):
        ranks = range(1, len(accuracies) + 1)
        low, high = zip(*intervals, strict=True)
        guesses.plot(ranks, accuracies, marker="o", markersize=3, label=f"head {head}")
        guesses.fill_between(ranks, low, high, alpha=0.15)
    guesses.set(xlabel="guess", ylabel="share of places where it is right", xscale="log", ylim=(0, None))
    guesses.legend(fontsize="small")
    heads = range(1, len(rows) + 1)
    after = [calibration.conditional((0,) * depth)[0] for depth in range(len(rows))]
    below, above = zip(*((row[0] - bounds[0][0], bounds[0][1] - row[0]) for row, bounds in rows), strict=True)
    firsts.errorbar(heads, [row[0] for row, _ in rows], (below, above), marker="o", capsize=3, label="at every place")
    firsts.plot(heads, after, marker="s", label="where the heads before were right")
    firsts.set(xlabel="head", ylabel="first guess right", ylim=(0, 1), xticks=heads)
    firsts.legend(fontsize="small")
    save_plot(figure, path)
