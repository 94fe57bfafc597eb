"""Claims about the end-to-end benchmark, at toy size: every stage runs, stops and goes on; held-out files stay unseen."""

import itertools
import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_end_to_end
from end_to_end import measuring
from end_to_end.pretraining import CHECKPOINT, Pretraining, pretraining
from end_to_end.source import held_out_ids, source, training_tokens
from end_to_end.work import Work
from transformers import PreTrainedTokenizerFast

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SOURCE = [LIBRARY / "asyncio", LIBRARY / "email"]


@pytest.fixture
def clock():
    """Seconds that pass at every look at the clock: what is stopped, and where, does not depend on the machine."""
    return itertools.count().__next__


def test_every_stage_is_done_in_slices_of_time(tmp_path, clock, capsys, monkeypatch):
    arguments = ["--work", str(tmp_path), "--size", "toy", "--minutes", "1", "--total-minutes", "14"]
    arguments += ["--source", *map(str, SOURCE)]
    halfway = set()
    slices, said = 0, "left"
    while "left" in said and slices < 50:
        slices += 1
        gpu_end_to_end.main(arguments, clock)
        said = capsys.readouterr().out
        if (tmp_path / CHECKPOINT).is_file():
            halfway.add("pretraining")
        for name in ("medusa-1", "medusa-2"):
            if list(tmp_path.glob(f"{name}/checkpoint-*")) and not (tmp_path / f"{name}.json").is_file():
                halfway.add(name)
    assert said == f"done: {tmp_path / 'results.md'}\n" and slices > 4
    assert halfway == {"pretraining", "medusa-1", "medusa-2"}

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["left"] == [] and set(results["seconds"]) == set(gpu_end_to_end.STAGES)
    assert results["pretraining"]["held_out_loss"] < results["pretraining"]["log"][0][1]
    assert results["medusa-2"]["config"]["backbone"] == "lora"
    for name in ("medusa-1", "medusa-2"):
        assert results["exactness"][name]["identical"] == {"plain": 1.0, "static": 1.0, "dynamic": 1.0}
    rows = {(row["setting"], row["decoder"]): row for row in results["bench"]["rows"]}
    heads = [f"{name}, {kind}" for name in ("medusa-1", "medusa-2") for kind in ("static", "dynamic")]
    settings = ["greedy", "sampled at 0.8"]
    assert list(rows) == [(setting, decoder) for setting in settings for decoder in ("generate", "plain", *heads)]
    for setting in settings:  # one seed: sampled Medusa says what sampled plain decoding says
        assert rows[setting, "medusa-1, dynamic"]["identical_to_plain"] == 1.0
        assert rows[setting, "plain"]["acceleration_rate"][0] == 1.0
    page = (tmp_path / "results.md").read_text()
    assert all(f"## {stage.capitalize()}" in page for stage in gpu_end_to_end.STAGES)
    assert "| asyncio |" in page and not re.search(r"\bnan\b", page)

    before = (tmp_path / "results.json").read_text()
    gpu_end_to_end.main(arguments, clock)
    assert (tmp_path / "results.json").read_text() == before  # what is done is not done again

    def with_a_broken_one(work, setting, whole=measuring.decoders_of):
        return {**whole(work, setting), "broken": Broken()}

    monkeypatch.setattr(measuring, "decoders_of", with_a_broken_one)
    for name in ("bench.json", "bench.jsonl"):
        (tmp_path / name).unlink()
    gpu_end_to_end.main([*arguments[:5], "100", *arguments[6:]], clock)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["failed"] == {f"{setting}, broken": "no such kernel" for setting in settings}
    assert [(row["setting"], row["decoder"]) for row in found["rows"]] == list(rows)


class Broken:
    """A decoder that fails on its machine."""

    def prepare(self, ids):
        pass

    def __call__(self, ids):
        raise RuntimeError("no such kernel")


def test_pretraining_that_was_stopped_ends_as_if_it_had_not_been(tmp_path):
    found = []
    for name, minutes in (("whole", 1000.0), ("sliced", 1.0)):
        now = itertools.count().__next__
        slices = 0
        while not found or len(found) < ("whole", "sliced").index(name) + 1:
            work, slices = Work(tmp_path / name, "toy", minutes, 4.0, now), slices + 1
            if slices == 1:
                source(work, SOURCE)
            try:
                with work.timed("pretraining"):
                    found.append(pretraining(work))
            except gpu_end_to_end.SliceOver:
                continue
        assert slices == 1 if name == "whole" else slices > 2
    whole, sliced = found
    assert whole["steps"] == sliced["steps"] and whole["log"] == sliced["log"]
    assert whole["held_out_loss"] == sliced["held_out_loss"]


def test_a_batch_that_does_not_fit_is_cut_up_and_layers_that_do_not_compile_run_as_they_are(tmp_path):
    ids = torch.randint(384, (8, 16), generator=torch.Generator().manual_seed(0))
    easy, hard = (Pretraining(Work(tmp_path / name, "toy", 1.0, 1.0), 384, 0) for name in ("easy", "hard"))

    def limited(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("too many rows")

    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel\n at great length")

    hard.model.register_forward_pre_hook(limited, with_kwargs=True)
    hard.compile()
    for layer in hard.model.model.layers:
        layer._compiled_call_impl = broken
    for _ in range(3):
        assert hard.train_on(ids) == pytest.approx(easy.train_on(ids), abs=1e-5)
    assert (easy.micro_batch, hard.micro_batch, hard.compiled) == (4, 2, "no: no such kernel")


def test_no_held_out_file_is_trained_on_and_copies_count_once(tmp_path):
    files = 90
    for number in range(files):
        lines = [f"def marker_{number:03d}_{line}(value):\n    return value + {line}\n" for line in range(20)]
        for copy in ("a", "b"):  # which differ in white space
            path = tmp_path / "source" / copy / f"module_{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(("\n" if copy == "a" else "\n\n").join(lines))
    (tmp_path / "source" / "broken.py").write_bytes(b"\xff\xfe" * 1000)
    work = Work(tmp_path / "work", "toy", 1.0, 1.0)
    found = source(work, [tmp_path / "source"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "work" / "tokenizer")
    trained = {n for n in range(files) if f"marker_{n:03d}_" in tokenizer.decode(training_tokens(work))}
    held = [tokenizer.decode(ids) for split in ("calibration", "test") for ids in held_out_ids(work, split)]
    held_out = {n for n in range(files) if any(f"marker_{n:03d}_" in text for text in held)}
    assert trained | held_out == set(range(files)) and not trained & held_out
    assert len(held_out) == len(held) == sum(found["held_out_files"].values()) > 0 and len(trained) == found["files"]


def test_work_that_cannot_be_done_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ["--work", str(tmp_path / "work"), "--size", "toy"]
    with pytest.raises(SystemExit, match=r"^error: no Python files in .*; give others as --source$"):
        gpu_end_to_end.main([*arguments, "--source", str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match=r"^error: .* was made with total_minutes 25.0, not 5.0; give another"):
        gpu_end_to_end.main([*arguments, "--total-minutes", "5"])
