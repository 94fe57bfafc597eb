"""Pages: a report as Markdown, and as one self-contained HTML file with the plots inside."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 13px }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 12px }
"""


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A plot."""

    svg: str  # the plot as an SVG element, for HTML
    file: str | None = None  # name of the plot's file beside the page, for Markdown; None: Markdown omits the plot


Block = str | Table | Plot  # a string is a heading if it begins with "## ", a list if its lines do with "- ", or a paragraph


@dataclass(frozen=True)
class Page:
    """A page of blocks."""

    title: str
    blocks: Sequence[Block]
    made_with: Mapping[str, Any] = field(default_factory=dict)  # model, machine and settings, which close the HTML page

    def to_markdown(self) -> str:
        parts = [f"# {self.title}", *filter(None, map(_markdown, self.blocks))]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        body = [f"<h1>{html.escape(self.title)}</h1>", *map(_html, self.blocks)]
        if self.made_with:
            lines = "\n".join(f"{name}: {value}" for name, value in self.made_with.items())
            body += ["<h2>Made with</h2>", f"<pre>{html.escape(lines)}</pre>"]
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{STYLE}</style>'
        return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Table):
        rule = ["---", *["--:"] * (len(block.header) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in [block.header, rule, *block.rows])
    if isinstance(block, Plot):
        return "" if block.file is None else f"![]({block.file})"
    return block


def _html(block: Block) -> str:
    if isinstance(block, Table):
        return "<table>" + _row("th", block.header) + "".join(_row("td", row) for row in block.rows) + "</table>"
    if isinstance(block, Plot):
        return block.svg
    if block.startswith("## "):
        return f"<h2>{html.escape(block[3:])}</h2>"
    if block.startswith("- "):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in block.splitlines()) + "</ul>"
    return f"<p>{_inline(block)}</p>"


def _row(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


def _inline(text: str) -> str:
    """A line of Markdown with bold and code as HTML."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", bold)
