"""Files: a written file is complete or absent, even if the process dies; an unreadable file is named in the error."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from medusa.errors import MedusaError, one_line

PARTIAL = ".partial"  # suffix of a file that is being written, or was when a process was killed; never read


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write a file or folder under; at the end it is flushed to the disk and renamed to `path`."""
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(path.name + PARTIAL)
    _remove(partial)  # left by a killed process
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
    """Write a text file; it is complete or absent."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write a JSON file, indented by two spaces; it is complete or absent."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def digest(value: Any) -> str:
    """A short hash of a JSON value: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read_text(path: str | Path, wrong: type[MedusaError]) -> str:
    """The text of a UTF-8 file, without the byte-order mark that some editors add; an error of class `wrong` if it cannot be
    read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise wrong(f"cannot read {path}: {error.strerror or one_line(error)}") from None
    except ValueError as error:  # UnicodeDecodeError is one, and what a name with a null byte raises
        raise wrong(f"cannot read {path}: {one_line(error)}; expected a text in UTF-8") from None


def read_json(path: str | Path, wrong: type[MedusaError]) -> Any:
    """The JSON value of a file; an error of class `wrong` if there is none."""
    return _parsed(json.loads, "JSON", path, wrong)


def read_yaml(path: str | Path, wrong: type[MedusaError]) -> Any:
    """The YAML value of a file; an error of class `wrong` if there is none."""
    return _parsed(yaml.safe_load, "YAML", path, wrong)


def _parsed(parse: Callable[[str], Any], kind: str, path: str | Path, wrong: type[MedusaError]) -> Any:
    text = read_text(path, wrong)
    try:
        return parse(text)
    # Syntax, integers with too many digits, invalid dates and the like, or lists nested too deeply.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise wrong(f"{path} is not valid {kind}: {one_line(error)}") from None


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode: JSON and command lines can contain half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
