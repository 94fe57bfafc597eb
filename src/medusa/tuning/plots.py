"""What tuning found, drawn: the curve over sizes, the choice marked (the paper's Figure 4), and the calibration."""

from __future__ import annotations

from pathlib import Path

from medusa.tuning.choice import Option, Tuned
from medusa.tuning.recording import Calibration


def draw_curve(tuned: Tuned, path: Path) -> None:
    """Draw what was tried, for every batch size, as the suffix of the file says (PNG or SVG)."""
    from matplotlib.figure import Figure

    batches = sorted(tuned.chosen)
    kinds = list(dict.fromkeys(option.kind for option in tuned.options))
    figure = Figure(figsize=(12, 3.6 * len(batches)), layout="constrained")
    grid = figure.subplots(len(batches), 3, squeeze=False)
    for row, batch in zip(grid, batches, strict=True):

        def overhead(option: Option, batch: int = batch) -> float:
            return option.step_seconds[batch] / tuned.plain.step_seconds[batch]

        def speedup(option: Option, batch: int = batch) -> float:
            return option.tokens_per_second(batch) / tuned.plain.tokens_per_second(batch)

        figures = (
            ("tokens a step", lambda option: option.acceleration_rate),
            ("overhead", overhead),
            (f"speedup, batch {batch}", speedup),
        )
        for axes, (label, value) in zip(row, figures, strict=True):
            for kind in kinds:
                options = sorted((o for o in tuned.options if o.kind == kind), key=lambda option: len(option.tree))
                axes.plot([len(o.tree) for o in options], [value(o) for o in options], marker="o", markersize=3, label=kind)
                if label == "tokens a step":
                    low, high = zip(*(option.interval for option in options), strict=True)
                    axes.fill_between([len(o.tree) for o in options], low, high, alpha=0.15)
            choice = tuned.chosen[batch]
            axes.axhline(1.0, color="grey", linewidth=0.8)
            axes.plot(len(choice.tree), value(choice), marker="*", markersize=14, color="black", label=f"chosen: {choice.name}")
            axes.set(xlabel="nodes", ylabel=label, xscale="log")
            axes.set_xscale("log", base=2)
        row[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_calibration(calibration: Calibration, path: Path) -> None:
    """Draw how often each guess of each head is right, with its interval, and how often the first one is where those of the
    heads before were: what the assumption that heads err independently leaves out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
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
    figure.savefig(path, dpi=120)
