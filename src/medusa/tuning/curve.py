"""The curve: acceptance, overhead and speedup against the size of the tree, the choice marked (the paper's Figure 4)."""

from __future__ import annotations

from pathlib import Path

from medusa.tuning.tune import Option, Tuned


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
