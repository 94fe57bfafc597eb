"""Records: JSONL files that a run adds to, every line whole and on the disk or not there at all, in folders it has claimed."""

from __future__ import annotations

import errno
import json
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from medusa.errors import InvalidInput
from medusa.runs.files import is_unicode, read_yaml, write_text


def make_folder(folder: Path) -> None:
    """Make a folder where there is none.

    Raises:
        InvalidInput: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot write to {folder}: {error.strerror}") from None


def hold(path: Path) -> AbstractContextManager:
    """Keep other processes from writing what this one writes: within `with`, or for as long as what is returned lives.
    The folder is made where there is none.

    Raises:
        InvalidInput: another process does, or the lock cannot be written.
    """
    make_folder(path.parent)
    lock = FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True, thread_local=False)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        raise InvalidInput(
            f"another process is writing {path} (it holds {lock.lock_file}); wait for it, stop it, or give another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) in (None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            warnings.warn(f"{path.parent} cannot be locked: see that no other process writes there", stacklevel=2)
            return nullcontext()
        raise InvalidInput(f"cannot write to {path.parent}: {error}") from None


def claim(path: Path, made_by: dict[str, Any]) -> None:
    """Note in a file what makes the folder's records; make the folder where there is none.

    Raises:
        InvalidInput: the folder cannot be written, or something else makes its records; what differs is named.
    """
    make_folder(path.parent)
    if path.exists():
        refuse_claimed(path, made_by)
    else:
        write_text(path, yaml.safe_dump(_as_read(made_by), sort_keys=False))


def refuse_claimed(path: Path, made_by: dict[str, Any]) -> None:
    """Refuse a folder that something else has claimed; of what makes the records some will do, so that this can be known early.

    Raises:
        InvalidInput: it has; what differs is named.
    """
    if path.exists():
        found = read_yaml(path, InvalidInput)
        refuse_other(path.parent, found if isinstance(found, dict) else {}, _as_read(made_by))


def _as_read(made_by: dict[str, Any]) -> dict[str, Any]:
    """As it will be read again: tuples are lists."""
    return json.loads(json.dumps(made_by))


def refuse_other(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to go on in a folder that something else made.

    Raises:
        InvalidInput: something else did; what differs is named.
    """
    other = [f"{name} {found.get(name)!r}, not {value!r}" for name, value in wanted.items() if found.get(name) != value]
    if other:
        raise InvalidInput(f"{folder} was made with {'; '.join(other)}; give another folder")


def read_lines(path: Path, what: str) -> dict[str, dict[str, Any]]:
    """The records of a JSONL file by their `id`, the last of an id counting; a half-written last line is cut off.

    Args:
        what: the name of a record, for errors.

    Raises:
        InvalidInput: a line is no record; the file is left as it is.
    """
    if not path.exists():
        return {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from None
    whole = content.rfind(b"\n") + 1
    records = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["id"]] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InvalidInput(f"{path}:{number} is no {what}; give another folder") from None
    if whole < len(content):
        if not content.startswith(b"{", whole):
            raise InvalidInput(f"{path} ends in something that is no {what}; give another folder")
        with path.open("r+b") as file:
            file.truncate(whole)
    return records


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add one record; when this returns it is on the disk.

    Raises:
        InvalidInput: it cannot be written (the disk is full); what was written before is kept.
    """
    line = json.dumps(record, ensure_ascii=False) + "\n"
    if not is_unicode(line):
        line = json.dumps(record) + "\n"  # escaped, as it came
    try:
        with path.open("ab") as file:
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}; make room and run the same command again") from None


class Journal:
    """A JSONL file of records by id that a run adds to, alone, and goes on from.

    Args:
        what: the name of a record, for errors.
    """

    def __init__(self, path: Path, what: str):
        self._held = hold(path)
        self.path = path
        self.records = read_lines(path, what)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record under its `id`, on the disk."""
        append_line(self.path, record)
        self.records[record["id"]] = record
