"""Claims about training in several processes: the losses and heads of one, resumed on any number, however they are sharded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import medusa
from medusa import EMBEDDED, MedusaModel
from medusa.errors import CheckpointError, InvalidInput
from tiny import plain_greedy, random_prompt, tiny_backbone
from training.test_run import determined_text

# 58 rows remain to be learnt, 8 in a step: step 8, the last of the first epoch, has 2, and the run ends in the second.
OPTIONS = {
    "max_steps": 13,
    "save_steps": 5,
    "num_heads": 2,
    "warmup_steps": 1,
    "logging_steps": 1,
    "held_out": 0.1,
    "learning_rate": 1e-2,
    "lora_rank": 2,
    "lora_dropout": 0.0,  # dropout is drawn by each process for itself
}
ONE, TWO = {"batch_size": 8, "gradient_accumulation": 1}, {"batch_size": 2, "gradient_accumulation": 2}
WAYS = {
    "medusa-1 path": {"heads_kind": "path"},
    "medusa-2 path": {"heads_kind": "path", "method": "medusa-2", "heads_steps": 0, "draft_vocabulary": "40"},
    "medusa-2 shared": {"heads_kind": "root", "method": "medusa-2", "heads_steps": 0, "shared_lm_head": True},
}


def alone(folder: Path, output: str, **options) -> dict:
    """The record of a run in this process."""
    medusa.train(str(folder / "backbone"), folder / "train.jsonl", folder / output, **OPTIONS | ONE | options)
    return json.loads((folder / output / "training.json").read_text())


def in_two(folder: Path, output: str, worker: tuple[str, ...] = ("-m", "medusa", "train"), **options) -> dict:
    """The record of a run in two processes."""
    given = [str(folder / "backbone"), "--data", str(folder / "train.jsonl"), "--output", str(folder / output)]
    for name, value in (OPTIONS | TWO | options).items():
        flag = f"--{name.replace('_', '-')}"
        given += [flag] * value if isinstance(value, bool) else [flag, str(value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *worker, *given]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads((folder / output / "training.json").read_text())


@pytest.fixture
def folder(tmp_path):
    determined_text(tmp_path / "train.jsonl", 64, seed=0)
    tiny_backbone(gain=1.0).save_pretrained(tmp_path / "backbone")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path / "backbone")
    return tmp_path


def losses(record: dict) -> list[float]:
    return [entry["loss"] for entry in record["log"] if "loss" in entry]


def agree(folder: Path, one: dict, other: dict, *outputs: str) -> None:
    """Two runs are the same but for the rounding of sums in another order: of gradients, by processes and batches."""
    assert len(losses(one)) == OPTIONS["max_steps"]
    assert losses(other) == pytest.approx(losses(one), rel=1e-4)
    wanted = {name: value for name, value in one["metrics"].items() if name != "epoch"}  # a matter of batches
    assert {name: other["metrics"][name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    names = "medusa_lm_head.safetensors", "adapter_model.safetensors"
    for name in (name for name in names if (folder / outputs[0] / name).exists()):
        first, second = (load_file(folder / output / name) for output in outputs)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(second[key], first[key], atol=1e-4, rtol=1e-3)


def cut(folder: Path, whole: str, output: str) -> None:
    """A copy of a run as if it had been killed after step 10, the second of the second epoch."""
    shutil.copytree(folder / whole, folder / output)
    shutil.rmtree(folder / output / "checkpoint-13")
    for name in ("training.json", "medusa_lm_head.safetensors"):
        (folder / output / name).unlink()
    assert [path.name for path in (folder / output).glob("checkpoint-*")] == ["checkpoint-10"]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_losses_and_heads_of_one_and_each_goes_on_from_the_others_checkpoint(folder, way):
    if "medusa-2" in way:
        pytest.importorskip("peft")
    one, two = alone(folder, "one", **WAYS[way]), in_two(folder, "two", **WAYS[way])
    assert two["processes"]["number"] == 2
    agree(folder, one, two, "one", "two")
    cut(folder, "two", "then one")
    agree(folder, one, alone(folder, "then one", resume=True, **WAYS[way]), "one", "then one")
    if way == "medusa-2 path":
        cut(folder, "one", "then two")
        agree(folder, one, in_two(folder, "then two", resume=True, **WAYS[way]), "one", "then two")
        with pytest.raises(InvalidInput, match=r"made with 8 rows per step.*pass --gradient-accumulation 4"):
            alone(folder, "then one", resume=True, **WAYS[way] | {"batch_size": 2})
    model = MedusaModel.from_pretrained(folder / "backbone", heads=folder / "two")
    prompt = random_prompt(12)
    assert model.generate(prompt, max_new_tokens=20)[0, 12:].tolist() == plain_greedy(model.backbone, prompt, 20)


@pytest.mark.parametrize("way", ["medusa-1 path", "medusa-2 path"])
def test_a_sharded_run_has_the_same_losses_and_saves_what_loads(folder, way):
    pytest.importorskip("peft")
    worker = (str(Path(__file__).parent / "fsdp_worker.py"),)
    sharded = in_two(folder, "sharded", worker, **WAYS[way])
    assert sharded["processes"] == {"type": "MULTI_GPU", "number": 2}  # what the worker takes its processes for
    assert list((folder / "sharded").glob("checkpoint-10/pytorch_model_fsdp*")), "not sharded"
    agree(folder, alone(folder, "one", **WAYS[way]), sharded, "one", "sharded")
    model = MedusaModel.from_pretrained(folder / "backbone", heads=folder / "sharded")
    prompt = random_prompt(12)
    assert model.generate(prompt, max_new_tokens=20)[0, 12:].tolist() == plain_greedy(model.backbone, prompt, 20)
    with pytest.raises(CheckpointError, match="was saved with FSDP and cannot be resumed without it; launch"):
        alone(folder, "sharded", resume=True, **WAYS[way] | {"max_steps": 20})
