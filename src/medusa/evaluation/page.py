"""The page of a bench: the report's tables with plots in them, one HTML file that needs nothing else."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from medusa.data.prompt_sets import OVERALL
from medusa.errors import InvalidInput
from medusa.evaluation.report import GENERATE, PLAIN, cells

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 13px }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 12px }
"""


def page(record: dict[str, Any]) -> str:
    """The report as HTML: speeds and speedups by category (paper Figures 3 and 8), tokens a step, tables, provenance.

    Args:
        record: the object of `results.json`.

    Raises:
        InvalidInput: matplotlib is not there.
    """
    found, made = record["decoders"], record["made_with"]
    parts = list(next(iter(found.values())))
    shown = parts if len(parts) > 2 else [OVERALL]  # one category is all there is
    base = PLAIN if PLAIN in found else GENERATE
    title = f"{made['model']} on {made['prompts']}"
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += ["<h2>Speed</h2>", _bars(found, shown, "tokens_per_second", "tokens per second, prefill included")]
    if base in found and not set(found) <= {PLAIN, GENERATE}:
        label = f"speedup over {'our plain loop' if base == PLAIN else 'generate'}"
        bars = _bars(found, shown, f"speedup_vs_{base}", label, without=(PLAIN, GENERATE), level=1.0)
        body += ["<h2>Speedup</h2>", bars]
    body += ["<h2>Tokens a step</h2>", _histograms(found)]
    for part in shown:
        body += [f"<h2>{html.escape(part)}</h2>", _table(*cells(found, part))]
    if record["left_out"]:
        body.append(f"<p>Left out, their prompts not fitting the context: {html.escape(', '.join(record['left_out']))}.</p>")
    told = "\n".join(f"{name}: {value}" for name, value in {**made, "rounds": record["rounds"]}.items())
    body += ["<h2>Made with</h2>", f"<pre>{html.escape(told)}</pre>"]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def _bars(
    found: dict[str, dict[str, Any]],
    parts: Sequence[str],
    figure: str,
    label: str,
    without: Sequence[str] = (),  # decoders
    level: float | None = None,  # a line to compare with
) -> str:
    """Bars side by side for every decoder in every part, with their intervals; a decoder's colour is the same on the page."""
    shown = {name: figures for name, figures in found.items() if name not in without}
    colours = {name: f"C{n}" for n, name in enumerate(found)}
    drawing, axes = _axes(max(6.0, 1.2 + 0.28 * len(parts) * (len(shown) + 1)))
    width = 0.85 / len(shown)
    for place, (name, figures) in enumerate(shown.items()):
        values = [figures[part][figure] for part in parts]
        heights = [value["value"] for value in values]
        ends = [
            [h - value[end] if value[end] is not None else 0.0 for h, value in zip(heights, values, strict=True)]
            for end in ("low", "high")
        ]
        at = [n + (place - (len(shown) - 1) / 2) * width for n in range(len(parts))]
        spread = [[max(0.0, low) for low in ends[0]], [max(0.0, -high) for high in ends[1]]]
        axes.bar(at, heights, width, label=name, color=colours[name], yerr=spread, capsize=2, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(parts)), parts, rotation=20 if len(parts) > 5 else 0)
    axes.set_ylabel(label)
    if level is not None:
        axes.axhline(level, color="grey", linewidth=0.8, linestyle="--")
    return _svg(drawing, axes)


def _histograms(found: dict[str, dict[str, Any]]) -> str:
    """The share of steps that emitted so many tokens, by decoder."""
    drawing, axes = _axes(7.0)
    for name, figures in found.items():
        steps = {int(length): count for length, count in figures[OVERALL]["acceptance_lengths"].items()}
        lengths = range(1, max(steps) + 1)
        axes.plot(lengths, [steps.get(n, 0) / sum(steps.values()) for n in lengths], marker="o", markersize=4, label=name)
    axes.set_xlabel("tokens emitted by a step")
    axes.set_ylabel("share of steps")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(drawing, axes)


def _axes(width: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidInput("the page's plots need matplotlib: pip install 'medusa-decoding[plots]'") from None
    drawing = Figure(figsize=(min(width, 16.0), 4.0), layout="constrained")
    axes = drawing.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def _svg(drawing: Any, axes: Any) -> str:
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    text = io.StringIO()
    drawing.savefig(text, format="svg", metadata={"Date": None})
    return "".join(text.getvalue().partition("<svg")[1:])  # without the XML header
