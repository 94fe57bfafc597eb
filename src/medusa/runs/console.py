"""Console: notes, spinners and progress bars, all on stderr."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


def note(message: str) -> None:
    """Print a line on stderr, above a progress bar if one is shown; on a terminal it is wrapped between words."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        message = textwrap.fill(message, width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
    tqdm.write(message, file=sys.stderr)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """On a terminal, show what is taking time, with a spinner that disappears at the end."""
    from rich.console import Console

    out = Console(stderr=True)
    with out.status(what) if out.is_terminal else nullcontext():
        yield


def progress(what: str, total: int, unit: str = "", done: int = 0, **options: Any) -> Any:
    """A progress bar (tqdm's): use it in `with` and call its `update(n)`.

    Args:
        total: number of units at the end.
        unit: name of a unit, in the plural.
        done: number of units that an earlier run has done.
        options: further arguments of tqdm.
    """
    from tqdm.auto import tqdm

    return tqdm(desc=what, total=total, initial=done, unit=f" {unit}", dynamic_ncols=True, **options)
