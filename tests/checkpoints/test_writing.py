"""Claims about writing: a process that dies while it writes leaves what was there, or what was to be, and nothing between."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from medusa import MedusaHeads, MedusaTree, load_tree
from medusa.checkpoints.reader import has_heads, load_heads
from medusa.checkpoints.writer import save_heads, write_checkpoint
from medusa.errors import InvalidInput
from medusa.runs.files import whole
from medusa.trees.files import save_tree

SIZES = (256, 4096, 4)  # 18 MB: long enough to be killed in
FOREVER = """
import shutil, sys, torch
from pathlib import Path
from medusa import MedusaHeads
from medusa.checkpoints.writer import save_heads, write_checkpoint
heads = MedusaHeads(*{sizes})
heads.requires_grad_(False)
while True:
    for value in (2.0, 1.0):
        for parameter in heads.parameters():
            parameter.fill_(value)
        if sys.argv[2] == "file":
            save_heads(heads, sys.argv[1])
        else:
            write_checkpoint(heads, sys.argv[1], "vllm")
            shutil.rmtree(sys.argv[1])
"""


def values(heads) -> set[float]:
    return {value for parameter in heads.parameters() for value in parameter.unique().tolist()}


@pytest.mark.parametrize("how", ["file", "folder"])
def test_kill_in_the_middle_of_writing_leaves_no_half(tmp_path, how):
    folder = tmp_path / "heads"
    if how == "file":
        heads = MedusaHeads(*SIZES)
        for parameter in heads.parameters():
            torch.nn.init.ones_(parameter)
        save_heads(heads, folder)
    child = subprocess.Popen([sys.executable, "-c", FOREVER.format(sizes=SIZES), str(folder), how])
    end = time.monotonic() + 120
    try:
        # Stopped wherever it is, until that is in the middle: the file begun under its partial name, and not yet renamed.
        while time.monotonic() < end:
            child.send_signal(signal.SIGSTOP)
            half = [path for path in tmp_path.rglob("*.safetensors.partial") if path.stat().st_size > 0]
            if half:
                break
            child.send_signal(signal.SIGCONT)
            time.sleep(0.002)
    finally:
        child.kill()
        child.wait()
    assert half, "never seen in the middle of writing"
    if how == "folder":
        assert not folder.exists() and not has_heads(folder)
        write_checkpoint(MedusaHeads(8, 16, 1), folder, "vllm")  # over what was left behind
        assert len(load_heads(folder)) == 1
    else:
        assert values(load_heads(folder)) in ({1.0}, {2.0})
        save_heads(MedusaHeads(8, 16, 1), folder)
        assert len(load_heads(folder)) == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_error_in_the_middle_leaves_what_was_there(tmp_path):
    path = tmp_path / "tree.json"
    save_tree(MedusaTree([(0,)]), path)
    with pytest.raises(RuntimeError), whole(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert load_tree(path) == MedusaTree([(0,)]) and [file.name for file in tmp_path.iterdir()] == ["tree.json"]


def test_conversion_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(InvalidInput, match="a merged model holds its backbone"):
        write_checkpoint(MedusaHeads(8, 16, 1), tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())


def test_heads_can_be_saved_over_the_file_they_are_mapped_from(tmp_path):
    heads = MedusaHeads(8, 16, 2)
    save_heads(heads, tmp_path)
    loaded = load_heads(tmp_path)
    save_heads(loaded, tmp_path)
    assert all(torch.equal(load_heads(tmp_path).state_dict()[name], tensor) for name, tensor in heads.state_dict().items())
