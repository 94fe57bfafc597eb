"""Whole files: what is written is there to its end or not at all, whenever the process dies."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"  # what is being written, or was when a process was killed: never read


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The name to write a file or a folder under; at the end it is flushed to the disk and renamed to `path`, at once."""
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(path.name + PARTIAL)
    _remove(partial)  # of a process that was killed
    try:
        yield partial
        for part in sorted(partial.rglob("*")) if partial.is_dir() else ():
            _flush(part)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except BaseException:
        _remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    if path.is_dir():
        with suppress(OSError):  # not every system opens or flushes folders
            _flush_handle(os.open(path, os.O_RDONLY))
    else:
        _flush_handle(os.open(path, os.O_RDWR))


def _flush_handle(handle: int) -> None:
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
