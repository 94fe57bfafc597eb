"""Plots: the figures of the paper's Appendix G for any model and hardware (matplotlib, the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medusa.runs.plotting import PLOT_SUFFIXES, new_figure, save_plot
from medusa.simulation.hardware import Hardware
from medusa.simulation.prediction import CANDIDATES, Acceleration, Point, Setting, predict
from medusa.simulation.roofline import BATCHES, LENGTHS, OPERATOR_KINDS, RooflinePoint, paper_table, scatter

MARKS = {"qkv": "o", "qk/pv": "^", "up/gate/down": "s"}


def save_figures(setting: Setting, acceleration: Acceleration, folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG, and return the files.

    roofline: Figures 9-17. attention_by_length, attention_by_batch, linear_by_batch: Figures 18-20. candidates (batch 1, length
    1024), batches (length 1024), lengths (batch 4): Figures 21-23.
    """
    hardware, written = setting.hardware, []

    def save(name: str, title: str, draw: Any) -> None:
        figure = new_figure(7, 5)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
        axes.legend(fontsize="small")
        for suffix in PLOT_SUFFIXES:
            written.append(folder / f"{name}{suffix}")
            save_plot(figure, written[-1])

    found = scatter(setting.shape, hardware, setting.dtype)
    save("roofline", "Operators: prefill and decoding", lambda axes: _roofline(axes, found, hardware, setting.dtype))
    for number, name, row, title in (
        (6, "attention_by_length", "length", "Attention products at batch 16"),
        (7, "attention_by_batch", "batch", "Attention products at length 1024"),
        (8, "linear_by_batch", "batch", "Linear layers of the MLP"),
    ):
        cells = paper_table(number, hardware, setting.shape)
        save(name, title, lambda axes, cells=cells, row=row: _curves(axes, cells, row, hardware))

    def points(batch: int, length: int) -> list[Point]:
        return [predict(setting, batch, length, size, acceleration) for size in CANDIDATES]

    save("candidates", "Batch 1, length 1024", lambda axes: _candidates(axes, points(1, 1024)))
    by_batch = {f"batch {b}": points(b, 1024) for b in BATCHES}
    save("batches", "Speedup at length 1024", lambda axes: _speedups(axes, by_batch))
    by_length = {f"length {s}": points(4, s) for s in LENGTHS}
    save("lengths", "Speedup at batch 4", lambda axes: _speedups(axes, by_length))
    return written


def _roof(axes: Any, hardware: Hardware, dtype: str, intensities: Sequence[float]) -> None:
    low, high = min(intensities) / 2, max(intensities) * 2
    steps = [low * (high / low) ** (k / 100) for k in range(101)]
    axes.loglog(steps, [hardware.attainable(x, dtype) / 1e12 for x in steps], "k--", linewidth=1, label="roofline")
    axes.set_xlabel("operational intensity, FLOPs per byte")
    axes.set_ylabel("TFLOP/s")


def _roofline(axes: Any, found: Sequence[RooflinePoint], hardware: Hardware, dtype: str) -> None:
    _roof(axes, hardware, dtype, [p.intensity for p in found])
    for kind, mark in MARKS.items():
        for phase, colour in (("prefill", "tab:red"), ("decoding", "tab:blue")):
            chosen = [p for p in found if OPERATOR_KINDS[p.operator] == kind and p.phase == phase]
            at, rates = [p.intensity for p in chosen], [p.predicted / 1e12 for p in chosen]
            axes.scatter(at, rates, marker=mark, s=14, color=colour, alpha=0.6, label=f"{kind}, {phase}")


def _curves(axes: Any, cells: Sequence[RooflinePoint], row: str, hardware: Hardware) -> None:
    _roof(axes, hardware, "bfloat16", [p.intensity for p in cells])
    for value in dict.fromkeys(getattr(p, row) for p in cells):
        line = [p for p in cells if getattr(p, row) == value]
        axes.plot([p.intensity for p in line], [p.predicted / 1e12 for p in line], "o-", markersize=3, label=f"{row} {value}")
    plain = [p for p in cells if p.candidates == 1]
    axes.scatter(
        [p.intensity for p in plain], [p.predicted / 1e12 for p in plain], color="grey", zorder=3, label="plain decoding"
    )


def _candidates(axes: Any, points: Sequence[Point]) -> None:
    sizes = [p.candidates for p in points]
    for name, label in (("acceleration_rate", "acceleration rate"), ("overhead", "normalised latency"), ("speedup", "speedup")):
        axes.plot(sizes, [getattr(p, name) for p in points], "o-", markersize=3, label=label)
    axes.set_xlabel("candidates")


def _speedups(axes: Any, lines: dict[str, list[Point]]) -> None:
    for label, points in lines.items():
        axes.plot([p.candidates for p in points], [p.speedup for p in points], "o-", markersize=3, label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("candidates")
    axes.set_ylabel("speedup")
