"""Plots: everything that needs matplotlib (the extra `plots`) directly: figures, saved as PNG or SVG or kept as SVG text."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.errors import InvalidInput
from medusa.runs.extras import require
from medusa.runs.records import make_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".svg")


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches; InvalidInput if matplotlib is not installed."""
    return require("matplotlib.figure", "plots", "a plot").Figure(figsize=(width, height), layout="constrained")


def save_plot(figure: Figure, path: Path, text: bool = False) -> None:
    """Write a figure as .png or .svg, in a folder that is made if it is missing; InvalidInput if that cannot be done. `text`
    keeps the text of an SVG as text, which is smaller and can be searched, but needs the reader's fonts."""
    if path.suffix not in PLOT_SUFFIXES:
        raise InvalidInput(f"a drawing is {' or '.join(PLOT_SUFFIXES)}, got {path}")
    make_folder(path.parent)
    try:
        _save(figure, path, path.suffix[1:], text)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from None


def svg_of(figure: Figure) -> str:
    """A figure as an SVG element, to stand in an HTML page."""
    text = io.StringIO()
    _save(figure, text, "svg")
    return "".join(text.getvalue().partition("<svg")[1:])  # without the XML header


def _save(figure: Figure, file: Any, kind: str, text: bool = False) -> None:
    import matplotlib

    # With the salt the same figure is the same file.
    with matplotlib.rc_context({"svg.fonttype": "none" if text else "path", "svg.hashsalt": "medusa"}):
        figure.savefig(file, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
