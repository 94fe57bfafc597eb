"""Claims about what is recorded: by one process at a time."""

import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest
from filelock import FileLock

from medusa import MedusaModel
from medusa.errors import InvalidInput
from medusa.runs.records import Journal, hold
from medusa.training.config import TrainingConfig
from medusa.training.data import Rows
from medusa.training.distillation import Shards
from medusa.training.run import IDENTITY, train_heads
from tiny import tiny_backbone

HOLDING = """
import pathlib, sys
from medusa.runs.records import hold
held = hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process_holding(path):
    command = [sys.executable, "-c", HOLDING, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            yield
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("samples", lambda folder: Shards(folder).add("a", {"text": "x"})),
        ("runs.jsonl", lambda folder: Journal(folder / "runs.jsonl", "run of a bench").add({"id": "a"})),
        (IDENTITY, lambda folder: train_heads(MedusaModel(tiny_backbone()), Rows([]), folder, TrainingConfig())),
    ],
)
def test_a_second_process_is_refused_and_the_first_being_killed_lets_go(tmp_path, name, write):
    with another_process_holding(tmp_path / name), pytest.raises(InvalidInput, match=f"another process is writing .*{name}"):
        write(tmp_path)
    try:
        write(tmp_path)
    except Exception as error:  # that there is nothing to train on
        assert "another process" not in str(error)
        assert name == IDENTITY


def test_a_process_may_hold_what_it_holds_and_lets_go_in_the_end(tmp_path):
    with hold(tmp_path / "a"):
        Journal(tmp_path / "a", "record")
        with pytest.raises(AssertionError), another_process_holding(tmp_path / "a"):
            pass
    with another_process_holding(tmp_path / "a"):
        pass


def test_where_files_cannot_be_locked_a_warning_takes_the_place_of_the_lock(tmp_path, monkeypatch):
    def refuse(self, **_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"), hold(tmp_path / "a"):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.undo()
        hold(tmp_path / "a")
