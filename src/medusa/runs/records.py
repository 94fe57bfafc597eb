"""Records: append-only JSONL files whose lines are durable or absent, in folders that belong to one run at a time."""

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
    """Make a folder if there is none; InvalidInput if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot write to {folder}: {error.strerror}") from None


def hold(path: Path) -> AbstractContextManager:
    """Lock a file against other processes, inside `with` or while the returned object lives; makes the folder if needed.
    InvalidInput if another process holds the lock, or it cannot be written."""
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
            warnings.warn(f"{path.parent} cannot be locked: make sure that no other process writes there", stacklevel=2)
            return nullcontext()
        raise InvalidInput(f"cannot write to {path.parent}: {error}") from None


def claim(path: Path, made_by: dict[str, Any]) -> None:
    """Note in a file what the folder's records are made with; makes the folder if needed. InvalidInput if they are made with
    something else, which is named."""
    make_folder(path.parent)
    if path.exists():
        refuse_claimed(path, made_by)
    else:
        write_text(path, yaml.safe_dump(_as_read(made_by), sort_keys=False))


def refuse_claimed(path: Path, made_by: dict[str, Any]) -> None:
    """Refuse a folder whose records are made with something else than is known so far; InvalidInput names what differs."""
    if path.exists():
        found = read_yaml(path, InvalidInput)
        refuse_other(path.parent, found if isinstance(found, dict) else {}, _as_read(made_by))


def _as_read(made_by: dict[str, Any]) -> dict[str, Any]:
    """The mapping as it will be read back: tuples become lists."""
    return json.loads(json.dumps(made_by))


def refuse_other(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise InvalidInput, which names the differences, if a folder was made with something else."""
    other = [f"{name} {found.get(name)!r}, not {value!r}" for name, value in wanted.items() if found.get(name) != value]
    if other:
        raise InvalidInput(f"{folder} was made with {'; '.join(other)}; give another folder")


def read_lines(path: Path, what: str) -> dict[str, dict[str, Any]]:
    """The records of a JSONL file by their `id`; the last record of an id counts. A half-written last line is cut off; another
    that is not a record is an InvalidInput, and the file is left unchanged."""
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
            raise InvalidInput(f"{path}:{number} is not a {what}; give another folder") from None
    if whole < len(content):
        if not content.startswith(b"{", whole):
            raise InvalidInput(f"the end of {path} is not a {what}; give another folder")
        with path.open("r+b") as file:
            file.truncate(whole)
    return records


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append a record; it is on the disk when this returns. InvalidInput if it cannot be written; earlier ones are kept."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    if not is_unicode(line):
        line = json.dumps(record) + "\n"  # escaped, as it was given
    try:
        with path.open("ab") as file:
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}; make room and run the same command again") from None


class Journal:
    """A JSONL file of records by id that one process appends to, and from which it resumes; errors say what a record is."""

    def __init__(self, path: Path, what: str):
        self._held = hold(path)
        self.path = path
        self.records = read_lines(path, what)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; it is on the disk when this returns."""
        append_line(self.path, record)
        self.records[record["id"]] = record
