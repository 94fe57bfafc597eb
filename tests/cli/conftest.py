"""Fixtures of the command-line tests."""

import io
import sys
from typing import NamedTuple

import pytest

from medusa.cli import main


class Ran(NamedTuple):
    """A command that has run."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def medusa(monkeypatch, capsys):
    """Runs a command in this process."""

    def run(*arguments: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["medusa", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return Ran(int(stop.value.code or 0), shown.out, shown.err)

    return run
