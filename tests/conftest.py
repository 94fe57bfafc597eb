"""Fixtures shared by the tests."""

import io
import os
import sys
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # each its share of the cores, the processes it starts too
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch
from transformers.utils import logging

from medusa import MedusaModel
from medusa.cli import main
from tiny import random_heads, random_tree, tiny_backbone

logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_model() -> MedusaModel:
    """A tiny random Llama with random heads and a tree wide enough to be right often."""
    backbone = tiny_backbone()
    return MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=64))


@pytest.fixture(scope="session")
def embedded_model() -> MedusaModel:
    """The embedded model in float32, where exactness is promised."""
    from medusa import EMBEDDED

    return MedusaModel.from_pretrained(EMBEDDED, dtype=torch.float32)


@pytest.fixture(scope="session")
def embedded_tokenizer():
    from transformers import AutoTokenizer

    from medusa import EMBEDDED

    return AutoTokenizer.from_pretrained(EMBEDDED)


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
