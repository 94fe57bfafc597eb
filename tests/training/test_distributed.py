"""Claims about training in several processes: the same losses as in one, and heads that load however they were sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from medusa import EMBEDDED, MedusaModel
from medusa.checkpoints.reader import load_heads
from tiny import plain_greedy, random_prompt, tiny_backbone
from training.test_run import determined_text

OPTIONS = {
    "--max-steps": 5,
    "--num-heads": 2,
    "--warmup-steps": 1,
    "--logging-steps": 1,
    "--held-out": 0.1,
    "--learning-rate": 1e-2,
    "--lora-rank": 2,
    "--lora-dropout": 0,
}


def run(folder: Path, output: str, processes: int, *options: str, worker: tuple[str, ...] = ("-m", "medusa", "train")) -> dict:
    common = [str(part) for option in OPTIONS.items() for part in option]
    given = [str(folder / "backbone"), "--data", str(folder / "train.jsonl"), "--output", str(folder / output), *common]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"] if processes > 1 else []
    command = [sys.executable, *launch, *worker, *given, *options]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
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


def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(folder):
    one = run(folder, "one", 1, "--batch-size", "8", "--gradient-accumulation", "1")
    two = run(folder, "two", 2, "--batch-size", "2", "--gradient-accumulation", "2")
    assert two["processes"]["number"] == 2 and len(losses(one)) == 5
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert two["accuracies"] == one["accuracies"] and two["metrics"]["eval_loss"] == pytest.approx(one["metrics"]["eval_loss"])
    heads = [load_heads(folder / name).state_dict() for name in ("one", "two")]
    for name in heads[0]:
        torch.testing.assert_close(heads[1][name], heads[0][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", [["medusa-1"], ["medusa-2", "--heads-steps", "0"]])
def test_a_sharded_run_has_the_same_losses_and_saves_what_loads(folder, method):
    pytest.importorskip("peft")
    options = [
        "--method",
        *method,
        "--batch-size",
        "2",
        "--gradient-accumulation",
        "2",
        "--lora-dropout",
        "0",
        "--save-steps",
        "3",
    ]
    worker = (str(Path(__file__).parent / "fsdp_worker.py"),)
    sharded = run(folder, "sharded", 2, *options, worker=worker)
    assert sharded["processes"] == {"type": "MULTI_GPU", "number": 2}  # what the worker takes its processes for
    assert list((folder / "sharded").glob("checkpoint-3/pytorch_model_fsdp*")), "not sharded"
    replicated = run(folder, "replicated", 2, *options)
    assert losses(sharded) == pytest.approx(losses(replicated), rel=1e-2)
    model = MedusaModel.from_pretrained(folder / "backbone", heads=folder / "sharded")
    prompt = random_prompt(12)
    assert model.generate(prompt, max_new_tokens=20)[0, 12:].tolist() == plain_greedy(model.backbone, prompt, 20)
