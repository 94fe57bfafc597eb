"""Claims about the end-to-end benchmark, at toy size: every stage runs, stops and resumes; held-out files stay unseen."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUNS = ("float32", "greedy", "sampled")


def start(work: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", BENCHMARKS / "end_to_end.sh", work, "toy"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.timeout(1200)
def test_every_stage_is_done_in_slices_of_time(tmp_path):
    first = start(tmp_path)
    while first.poll() is None and not (tmp_path / "backbone.done").is_file():
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGTERM)  # as `timeout` does, during the next stage
    assert first.wait() != 0 and not (tmp_path / "results.md").is_file()
    pretrained = (tmp_path / "backbone" / "model.safetensors").stat().st_mtime_ns

    for _ in range(2):  # what is done is not done again
        second = start(tmp_path)
        assert second.communicate()[0].endswith(f"done: {tmp_path / 'results.md'}\n") and second.returncode == 0
        assert (tmp_path / "backbone" / "model.safetensors").stat().st_mtime_ns == pretrained

    for name in ("medusa-1", "medusa-2"):
        found = {run: json.loads((tmp_path / f"{name}-{run}" / "results.json").read_text()) for run in RUNS}
        figures = {run: {key: each["overall"] for key, each in record["decoders"].items()} for run, record in found.items()}
        assert figures["float32"]["generate"]["identical_to_plain"] == 1.0
        for run in RUNS:  # sampled Medusa emits what sampled plain decoding emits for the same seed
            assert figures[run]["medusa"]["identical_to_plain"] == 1.0
            assert figures[run]["plain"]["acceleration_rate"]["value"] == 1.0
        assert all(f"# {name}-{run}\n" in (tmp_path / "results.md").read_text() for run in RUNS)
    assert json.loads((tmp_path / "medusa-2" / "training.json").read_text())["config"]["backbone"] == "lora"


def test_no_held_out_file_is_trained_on_and_copies_count_once(tmp_path):
    files = 90
    for number in range(files):
        lines = [f"def marker_{number:03d}_{line}(value):\n    return value + {line}\n" for line in range(20)]
        for copy in ("a", "b"):  # which differ in white space
            path = tmp_path / "source" / copy / f"module_{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(("\n" if copy == "a" else "\n\n").join(lines))
    (tmp_path / "source" / "broken.py").write_bytes(b"\xff\xfe" * 1000)
    code_model(tmp_path / "work", tmp_path / "source")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "work" / "random")

    def rows(name: str) -> list[str]:
        lines = (tmp_path / "work" / f"{name}.jsonl").read_text().splitlines()
        return [tokenizer.decode(json.loads(line)["input_ids"]) for line in lines]

    text = "".join(rows("train"))
    trained = {number for number in range(files) if f"marker_{number:03d}_" in text}
    held = rows("calibration") + rows("test")
    # The last row of training tokens, which is not full, may hold one more file.
    assert files - len(held) - 1 <= len(trained) <= files - len(held) < files
    assert all(text.count(f"marker_{number:03d}_3(") <= 1 for number in trained)
    paths = [tmp_path / "source" / "a" / f"module_{number}.py" for number in range(files)]
    sources = ["".join(path.read_text().split()) for path in paths]
    homes = [{n for n, source in enumerate(sources) if "".join(prompt.split()) in source} for prompt in held]
    assert all(home - trained for home in homes)


def test_work_that_cannot_be_done_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    done = code_model(tmp_path / "work", tmp_path / "empty", check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: too few Python files in ")
    (tmp_path / "work").mkdir(exist_ok=True)
    (tmp_path / "work" / "size").write_text("100m\n")
    first = subprocess.run(["bash", BENCHMARKS / "end_to_end.sh", tmp_path / "work", "toy"], capture_output=True, text=True)
    assert first.returncode == 2 and "is of size 100m; use another folder" in first.stderr


def code_model(work: Path, source: Path, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / "code_model.py", work, "--size", "toy", "--source", source]
    return subprocess.run(command, capture_output=True, text=True, check=check)
