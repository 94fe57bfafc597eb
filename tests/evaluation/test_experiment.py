"""Claims about the experiments: every one runs, shows what its journal holds, goes on where it was, and refuses in one line."""

import json
import sys
import typing
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

import medusa
from medusa import EMBEDDED, MedusaHeads, MedusaModel, MedusaTree
from medusa.checkpoints.adapter import attach_adapter, save_adapter
from medusa.cli import main
from medusa.cli.experiment import ExperimentName
from medusa.errors import InvalidInput
from medusa.evaluation.catalog import EPSILONS, EXPERIMENTS, Setup, best_dense_tree, speeds
from medusa.evaluation.paper import Paper
from medusa.metrics import expected_acceptance_length
from tiny import random_heads, tiny_backbone

WORDS = [
    "def f(x):\n    return",
    "import os\nimport sys",
    "class A:\n    pass",
    "for x in range(9):\n",
    "while True:\n",
    "a = [1, 2]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded_tokenizer):
    """A model whose heads say what its LM head says, the same trained as Medusa-2, a draft model and prompts, on the disk."""
    path = tmp_path_factory.mktemp("experiments")
    torch.manual_seed(0)
    for name, layers in (("model", 4), ("small", 2)):
        backbone = tiny_backbone(vocab_size=len(embedded_tokenizer), max_position_embeddings=256, num_hidden_layers=layers)
        backbone.save_pretrained(path / name)
        embedded_tokenizer.save_pretrained(path / name)
    backbone = AutoModelForCausalLM.from_pretrained(path / "model")
    heads = MedusaHeads.for_lm_head(backbone.get_output_embeddings(), 3, 1, False)
    for name in ("heads", "medusa-2"):
        MedusaModel(backbone, heads, MedusaTree.dense([3, 1])).save_pretrained(path / name)
    attach_adapter(backbone, rank=2, alpha=8, dropout=0.0)
    trained = {name: torch.randn_like(p) for name, p in backbone.named_parameters() if "lora_" in name}
    save_adapter(backbone, path / "medusa-2", None, trained)
    records = [{"question_id": n, "category": "ab"[n % 2], "turns": [WORDS[n]]} for n in range(2)]
    (path / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "alpaca.json").write_text(json.dumps([{"instruction": text, "dataset": "helpful"} for text in WORDS[:2]]))
    (path / "calibration.txt").write_text("".join(" ".join(text.split()) + "\n" for text in WORDS[2:]))
    return path


def ran(monkeypatch, *arguments: str, code: int = 0) -> None:
    """`medusa experiment` in this process, ending with an exit code."""
    monkeypatch.setattr(sys, "argv", ["medusa", "experiment", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code


def given(folder, name: str, output, *more: str) -> list[str]:
    prompts = "alpaca.json" if name == "table-4" else "questions.jsonl"
    options = [name, str(folder / "model"), "--heads", str(folder / "heads"), "--prompts", str(folder / prompts), "-n", "12"]
    if EXPERIMENTS[name].calibrates:
        options += ["--calibration-prompts", str(folder / "calibration.txt")]
    return [*options, "--output", str(output), *more]


ROWS = {
    "figure-3": ["generate", "plain", "Medusa-1", "Medusa-2"],
    "figure-4": None,
    "figure-5": ["plain", "random sampling", "greedy", "typical, epsilon 0.01", "typical, epsilon 0.25"],
    "table-1": ["generate", "plain", "Medusa-1", "Medusa-2", "small, gamma 2"],
    "table-3": None,
    "table-4": ["generate", "plain", "Medusa-1"],
    "figure-7": ["generate", "plain", "small, gamma 2", "small, gamma 3", "model, gamma 2", "model, gamma 3"],
}
MORE = {
    "figure-3": ["--medusa-2", "medusa-2"],
    "figure-4": ["--nodes", "4", "--nodes", "8"],
    "figure-5": ["--epsilon", "0.01", "--epsilon", "0.25"],
    "table-1": ["--medusa-2", "medusa-2", "--draft", "small", "--gamma", "2"],
    "table-3": ["--medusa-2", "medusa-2", "--nodes", "6"],
    "table-4": [],
    "figure-7": ["--draft", "small", "--draft", "model", "--gamma", "2", "--gamma", "3"],
}


def options_of(folder, name: str) -> list[str]:
    return [str(folder / word) if word in ("medusa-2", "small", "model") else word for word in MORE[name]]


def test_there_is_a_case_for_every_experiment():
    assert set(ROWS) == set(MORE) == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_shows_what_its_journal_holds(name, tmp_path, folder, monkeypatch, capsys):
    ran(monkeypatch, *given(folder, name, tmp_path, *options_of(folder, name), "--json"))
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "results.json").read_text())
    found = {row: parts["overall"] for row, parts in record["decoders"].items()}
    if ROWS[name] is not None:
        assert list(found) == ROWS[name]
    journal = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    for row, figures in found.items():
        runs = [run for run in journal if run["id"].split("/", 1)[1].rsplit("/", 1)[0] == row]
        tokens = sum(len(tokens) for run in runs for tokens in run["tokens"])
        steps = sum(len(lengths) for run in runs for lengths in run["lengths"])
        assert (figures["questions"], figures["tokens"]) == (2, tokens)
        assert figures["acceleration_rate"]["value"] == pytest.approx(tokens / steps)
        assert figures["tokens_per_second"]["value"] == pytest.approx(tokens / sum(run["seconds"] for run in runs))
        assert figures.get("identical_to_plain", 1.0) == 1.0 and ("quality" in figures) == EXPERIMENTS[name].quality
    if "Medusa-2" in found:  # its adapter is in use: it says other things
        said = {run["id"]: run["tokens"] for run in journal}
        assert all(said[f"{n}/Medusa-2/0"] != said[f"{n}/plain/0"] for n in range(2))
        assert "identical_to_plain" not in found["Medusa-2"]
    page = (tmp_path / "results.md").read_text()
    assert all(f"\n| {row} | " in page for row in found) and "**What differs:**" in page
    printed = EXPERIMENTS[name].paper
    assert printed.says in page and all(f"| {' | '.join(row)} |" in page for row in printed.rows)
    assert record["missing"] == (["Medusa-2: pass --medusa-2 HEADS"] if name == "table-4" else [])
    first, *_ = (json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines())
    assert set(first["answers"]) == set(found)  # for a judge
    if EXPERIMENTS[name].axis is not None and "figure.svg" in page:
        assert (tmp_path / "figure.png").stat().st_size > 1000 and "<svg" in (tmp_path / "figure.svg").read_text()
    claims(name, found, record["entries"])


def claims(name: str, found: dict, entries: dict) -> None:
    """What holds on any model, and on this one, whose heads are right where it repeats itself."""
    rates = {row: figures["acceleration_rate"]["value"] for row, figures in found.items()}
    if name == "figure-4":
        for kind in ("independent", "joint", "dynamic"):
            assert rates[f"{kind} 8"] >= rates[f"{kind} 4"], kind
            assert len(entries[f"{kind} 8"]["tree"].get("paths", range(7))) == 7
        drawn = {row: each for row, each in entries.items() if each["series"] == "random dense"}
        assert {each["at"] for each in drawn.values()} == {4, 8} and len(drawn) > 2
        assert all(MedusaTree(each["tree"]["paths"]) in dense(each["at"]) for each in drawn.values())
    elif name == "figure-5":
        assert rates["greedy"] > 1 and found["plain"]["quality"] == found["random sampling"]["quality"]
        assert found["plain"]["log_likelihood_vs_plain"] == 0 < found["greedy"]["log_likelihood_vs_plain"]
        assert found["greedy"]["quality"] != found["random sampling"]["quality"]
    elif name == "table-3":
        assert entries["heads without a tree"]["tree"]["paths"] == [[0], [0, 0], [0, 0, 0]]
        assert "dynamic" in entries["with a dynamic tree"]["tree"]
        rows = ("with a dense tree", "with the optimised tree", "with the jointly optimised tree")
        assert all(1 <= len(entries[row]["tree"]["paths"]) <= 5 for row in rows)
    elif name == "figure-7":
        assert rates["model, gamma 3"] > rates["model, gamma 2"] > 2  # it drafts for itself: every guess is right


def test_heads_that_are_not_the_papers_are_not_called_so():
    backbone = tiny_backbone()
    for kind, name in (("medusa", "Medusa-1"), ("root", "Medusa-1, root heads"), ("path", "Medusa-1, path heads")):
        reads = {} if kind == "medusa" else {"heads_kind": kind, "embedding_size": backbone.config.hidden_size, "shared": True}
        model = MedusaModel(backbone, random_heads(backbone, **reads), MedusaTree([(0,)]))
        assert name in speeds(Setup(model, {"max_new_tokens": 4}, lambda _: []))


def dense(nodes: int) -> list[MedusaTree]:
    """All dense trees of a size with up to three heads."""
    sizes = [(a,) for a in range(1, nodes)]
    sizes += [(a, b) for a in range(1, nodes) for b in range(1, nodes) if a + a * b < nodes]
    sizes += [(*s, c) for s in sizes if len(s) == 2 for c in range(1, nodes) if s[0] * (1 + s[1] * (1 + c)) < nodes]
    return [tree for s in sizes if len(tree := MedusaTree.dense(list(s))) == nodes]


def test_an_experiment_that_was_killed_goes_on_and_a_changed_one_is_refused(tmp_path, folder, monkeypatch, capsys):
    arguments = given(folder, "table-3", tmp_path, "--nodes", "6")
    ran(monkeypatch, *arguments)
    runs = tmp_path / "runs.jsonl"
    whole = runs.read_bytes()
    lines = whole.splitlines(keepends=True)
    runs.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # as a kill leaves it
    recorded = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "recorded").iterdir()}
    ran(monkeypatch, *arguments)
    after = runs.read_bytes().splitlines(keepends=True)
    assert after[:5] == lines[:5] and [json.loads(line)["id"] for line in after] == [json.loads(line)["id"] for line in lines]
    assert [json.loads(a)["tokens"] for a in after] == [json.loads(b)["tokens"] for b in lines]
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "recorded").iterdir()} == recorded
    capsys.readouterr()
    for more, message in ((["--nodes", "5"], "was made with trees"), (["--nodes", "6", "-n", "9"], "was made with settings")):
        ran(monkeypatch, *given(folder, "table-3", tmp_path, *more), code=1)
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert runs.read_bytes() == b"".join(after)


def test_the_best_dense_tree_is_the_best_of_all_of_its_size_or_less():
    accuracies = [[0.5, 0.2, 0.1, 0.05], [0.4, 0.2, 0.1, 0.05], [0.3, 0.2, 0.1, 0.05]]
    rates = [expected_acceptance_length(best_dense_tree(accuracies, nodes), accuracies) for nodes in range(1, 12)]
    assert rates[0] == 1.0 and all(a <= b for a, b in pairwise(rates))
    every = [tree for nodes in range(2, 12) for tree in dense(nodes) if tree.max_rank < 4]
    assert rates[-1] == max(expected_acceptance_length(tree, accuracies) for tree in every)


def test_the_papers_tables_have_a_figure_under_every_header():
    for experiment in EXPERIMENTS.values():
        assert isinstance(experiment.paper, Paper) and experiment.paper.setting
        assert len({len(row) for row in experiment.paper.rows}) <= 1
    assert EPSILONS[0] == 0.01 and EPSILONS[-1] == 0.25 and len(EPSILONS) == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure-7"], "figure-7 needs --draft"),
        (["table-4"], "table-4 needs --prompts"),
        (["figure-3", "--gamma", "2"], "figure-3 takes no --gamma; it takes --prompts, --medusa-2"),
        (["table-3", "--nodes", "4", "--nodes", "8"], "table-3 compares trees of one size"),
        (["figure-5", "--epsilon", "0"], "--epsilon is 0.0, expected above 0"),
        (["figure-3", "x"], "no prompts; pass --prompts"),
        (["figure-4", "x", "--prompts", "y.txt"], "figure-4 searches trees; pass --calibration-prompts"),
        (["figure-3", "--medusa-2", str(EMBEDDED)], "holds no adapter; --medusa-2 takes"),
    ],
)
def test_our_errors_are_one_line_and_exit_1(arguments, message, tmp_path, monkeypatch, capsys):
    ran(monkeypatch, *arguments, "--output", str(tmp_path / "out"), code=1)
    said = capsys.readouterr()
    assert said.out == "" and message in said.err.splitlines()[-1] and said.err.splitlines()[-1].startswith("medusa: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure-9"], "'figure-3', 'figure-4', 'figure-5'"),
        (["figure-4", "--nodes", "1"], "'--nodes'"),
        (["figure-3", "--rounds", "0"], "'--rounds'"),
    ],
)
def test_values_out_of_range_are_usage_errors(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    ran(monkeypatch, *arguments, code=2)
    assert message in capsys.readouterr().err


def test_the_command_and_the_function_know_the_same_experiments():
    assert set(typing.get_args(ExperimentName)) == set(EXPERIMENTS)
    with pytest.raises(InvalidInput, match="no experiment 'figure-9'; there are figure-3, figure-4, figure-5, table-1"):
        medusa.experiment("figure-9")
