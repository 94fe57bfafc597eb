"""Output of the commands: tables that fit the terminal, facts one per line, streamed text."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medusa.runs.console import note

if TYPE_CHECKING:
    from rich.console import Console

UNCUT = 1000  # columns of a file or pipe: nothing is wrapped there
READABLE = 100  # columns of text: longer lines are hard to read
WORTH = 1.2  # tokens per step; trees that accept less are seldom faster than plain decoding
STEPS_TO_TELL = 8  # number of steps after which a low acceleration rate is not just chance


def speed(tokens: int, steps: int, seconds: float) -> str:
    """The speed of an answer, in words.

    >>> speed(30, 12, 1.5)
    '20.0 tokens/s, 2.50 tokens per step'
    """
    return f"{tokens / seconds:.1f} tokens/s, {tokens / steps:.2f} tokens per step"


def note_low_rate(nodes: int, tokens: int, steps: int) -> None:
    """Warn if hardly any guesses of a tree are accepted: its steps cost more than plain ones."""
    if nodes > 1 and steps >= STEPS_TO_TELL and tokens / steps < WORTH:
        note(f"a tree of {nodes} nodes with so few accepted guesses is likely slower than --tree root; train the heads longer")


def console(stderr: bool = False) -> Console:
    """A console for stdout or stderr, as wide as the terminal; lines in a file or pipe are not wrapped."""
    from rich.console import Console

    found = Console(stderr=stderr)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(stderr=stderr, width=UNCUT)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", **options: Any) -> None:
    """Print a table on stdout. Columns that do not fit follow in another table below, beside the same key columns; for the
    options see `tables`."""
    out = console()
    for table in tables(out.width, header, rows, title, **options):
        out.print(table)


def tables(
    width: int,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    caption: str = "",
    keys: int = 1,  # number of key columns, which say what a row is about; the columns to their right hold figures
    bold: Collection[int] = (),  # numbers of the rows in bold
) -> list[Any]:
    """The tables that `print_table` prints, each at most `width` characters wide if its widest figure allows it."""
    from rich.cells import cell_len
    from rich.table import Table

    longest = [max((cell_len(row[n]) for row in rows), default=0) for n in range(len(header))]
    # A title may be wrapped between words, a figure may not.
    titles = [
        "\n".join(textwrap.wrap(name, max(8, at_least), break_long_words=False)) for name, at_least in zip(header, longest)
    ]
    widths = [max(at_least, *map(cell_len, name.splitlines() or [""])) for name, at_least in zip(titles, longest)]
    parts = list(_parts(widths, keys, width))
    found = []
    for number, part in enumerate(parts):
        table = Table(title=title if number == 0 else None, title_justify="left", caption_justify="left")
        table.caption = caption if caption and number == len(parts) - 1 else None
        for n in part:
            table.add_column(titles[n], justify="left" if n < keys else "right", overflow="fold", no_wrap=n >= keys)
        for number_of_row, row in enumerate(rows):
            table.add_row(*(row[n] for n in part), style="bold" if number_of_row in bold else None)
        found.append(table)
    return found


def _parts(widths: Sequence[int], keys: int, room: int) -> Iterator[list[int]]:
    """The columns of each table: the key columns, and as many of the others as fit, at least one."""
    of_keys = list(range(keys))
    part, used = list(of_keys), 1 + sum(widths[n] + 3 for n in of_keys)
    taken = used
    for n in range(keys, len(widths)):
        if len(part) > keys and taken + widths[n] + 3 > room:
            yield part
            part, taken = list(of_keys), used
        part.append(n)
        taken += widths[n] + 3
    yield part


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Print facts one per line; those that are unknown or empty are left out."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value not in (None, "", [], ()):
            grid.add_row(Text(name.replace("_", " "), style="dim"), Text(fact(value)))
    out = console()
    out.print(Text(title, style="bold"))
    out.print(Padding(grid, (0, 0, 0, 2), expand=False))


def fact(value: Any) -> str:
    """A value in words.

    >>> fact(True), fact(1234567), fact(["a", "b"])
    ('yes', '1,234,567', 'a, b')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class Words:
    """Streamed text in styles; on a terminal it is wrapped between words, elsewhere it stays as it is."""

    def __init__(self, out: Console):
        self._out, self._wraps = out, out.is_terminal
        self._width = min(out.width, READABLE)
        self._column = 0
        self._word: list[tuple[str, str | None]] = []

    def put(self, text: str, style: str | None = None) -> None:
        """Show a piece, up to the last word that is known to be complete."""
        if not self._wraps:
            self._write(text, style)
            return
        from rich.cells import cell_len

        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            if not part.isspace():
                self._word.append((part, style))
                if cell_len(part) > len(part):  # a script without spaces, which is wrapped anywhere
                    self._end_word()
                continue
            self._end_word()
            if part == "\n" or self._column + len(part) > self._width:
                self._write("\n", None)
                self._column = 0
            else:
                self._write(part, style)
                self._column += len(part)

    def end(self) -> None:
        """Show the rest, and end the line."""
        self._end_word()
        self._write("\n", None)
        self._column = 0

    def _end_word(self) -> None:
        from rich.cells import cell_len

        width = sum(cell_len(part) for part, _ in self._word)
        if self._column and self._column + width > self._width:
            self._write("\n", None)
            self._column = 0
        for part, style in self._word:
            self._write(part, style)
        self._column += width
        if self._column > self._width:  # a word longer than a line, which the terminal wraps
            self._column %= self._width
        self._word = []

    def _write(self, text: str, style: str | None) -> None:
        from rich.text import Text

        self._out.print(Text(text, style=style or ""), end="", soft_wrap=True)
