"""Claims about the first hour: mistakes are told at once, runs that fail leave nothing, and nothing is slow without a word."""

import io
import json

import pytest
import torch
from rich.console import Console

from medusa import MedusaModel, MedusaTree
from medusa.cli import showing
from medusa.cli.train import FIELDS, GROUPS
from medusa.training.config import resolve
from medusa.trees.files import save_tree
from tiny import random_heads, random_tree, tiny_backbone

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def own(tmp_path_factory, embedded_tokenizer):
    """A folder with a user's own model: `text`, `chat` (the same with a chat template) and `heads` without a tree file."""
    folder = tmp_path_factory.mktemp("own")
    backbone = tiny_backbone(vocab_size=4096, max_position_embeddings=512, eos_token_id=0, dtype=torch.float32)
    for name, template in (("text", None), ("chat", TEMPLATE)):
        backbone.save_pretrained(folder / name)
        embedded_tokenizer.chat_template = template
        embedded_tokenizer.save_pretrained(folder / name)
    embedded_tokenizer.chat_template = None
    MedusaModel(backbone, random_heads(backbone, 2), random_tree(1, 8, depth=2)).save_pretrained(folder / "heads")
    (folder / "heads" / "medusa_tree.json").unlink()
    return folder


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model here has done too much."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("medusa.checkpoints.loading.load_backbone", load)
    monkeypatch.setattr("medusa.model.MedusaModel.from_pretrained", load)


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


ASKED = [{"prompt": "Hi"}, {"prompt": "Bye"}]


# Said before a model is loaded.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{own}/text", "--data", "no.jsonl", "-o", "{new}"], "no data file no.jsonl"),
        (
            ["train", "{own}/text", "--data", "{set}", "--eval-data", "no.txt", "-o", "{new}"],
            "has a 'prompt' and no 'completion'",
        ),
        (
            ["train", "{own}/text", "--data", "{texts}", "--heads", "{own}/text", "-o", "{new}"],
            "has no Medusa heads to start from",
        ),
        (["train", "{own}/text", "--data", "{texts}", "-o", "{begun}"], "checkpoints of a run; continue it with --resume"),
        (["distill", "{own}/chat", "--data", "no.txt", "-o", "{new}"], "no data file no.txt"),
        (["distill", "{own}/chat", "--data", "{set}", "-o", "{made}"], "was made with model 'other', not"),
        (
            ["distill", "{own}/chat", "--data", "{set}", "--heads", "{own}/text", "-o", "{new}"],
            "has no Medusa heads; give some",
        ),
        (["tune", "{own}/text", "--heads", "{own}/heads", "--prompts", "no.jsonl"], "no data file no.jsonl"),
        (["tune", "{own}/text", "--heads", "{own}/heads", "--prompts", "{one}"], "holds one prompt"),
        (
            ["bench", "{own}/text", "--prompts", "{set}", "--heads", "{own}/heads", "-o", "{benched}"],
            "max_new_tokens 9, not 256",
        ),
        (["bench", "{own}/text", "--prompts", "{set}", "--heads", "{own}/heads", "--tree", "no.json"], "no tree file no.json"),
        (["generate", "{own}/text", "x", "--heads", "{own}/heads", "-n", "5000"], "exceed the context of 512; lower"),
        (["generate", "{own}/text", "x"], "has no Medusa heads; give some with --heads FOLDER, train some (medusa train"),
        (["generate", "{own}/text", "--prompt-file", "{empty}"], "is empty"),
        (["generate", "{own}/text", "--prompt-file", "prompts.jsonl"], "is a set of prompts, --prompt-file the text of one"),
        (["chat", "Tell me a story"], "looks like a prompt; start medusa chat MODEL"),
        (["demo", "Tell me a story"], "looks like a prompt; give it with --prompt"),
        (["demo", "{own}/text", "--heads", "{own}/heads"], "is not a chat model, which could answer our questions"),
    ],
)
def test_what_can_be_known_without_a_model_is_said_before_one_is_loaded(medusa, own, tmp_path, no_model, arguments, message):
    made, begun, benched = (tmp_path / name for name in ("made", "begun", "benched"))
    for folder in (made, begun / "checkpoint-1", benched):
        folder.mkdir(parents=True)
    (begun / "run.json").write_text("{}")
    (made / "distillation.yaml").write_text("model: other\n")
    (benched / "bench.yaml").write_text("max_new_tokens: 9\n")
    lines(made / "samples-00000.jsonl", {"id": "a", "text": "x"})
    (tmp_path / "empty.txt").write_text("\n")
    places = {
        "own": own,
        "new": tmp_path / "new",
        "made": made,
        "begun": begun,
        "benched": benched,
        "set": lines(tmp_path / "set.jsonl", *ASKED),
        "one": lines(tmp_path / "one.jsonl", ASKED[0]),
        "texts": lines(tmp_path / "texts.jsonl", {"text": "x = 1\n" * 9}),
        "empty": tmp_path / "empty.txt",
    }
    status, out, err = medusa(*(argument.format(**places) for argument in arguments))
    assert status == 1 and message in err and out == ""
    assert not (tmp_path / "new").exists()


def test_a_distillation_that_fails_to_load_leaves_no_folder_and_the_corrected_one_runs(medusa, own, tmp_path):
    prompts = lines(tmp_path / "prompts.jsonl", {"prompt": "Hi"}, {"instruction": "Bye"})
    command = ["--data", prompts, "-o", tmp_path / "made", "--max-new-tokens", "4", "--temperature", "0"]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((own / "chat" / "config.json").read_text())
    assert medusa("distill", broken, *command)[0] == 1 and not (tmp_path / "made").exists()
    status, out, err = medusa("distill", own / "chat", *command)
    assert status == 0 and "2 samples made" in out, err
    status, _, err = medusa("distill", own / "text", "--data", "self", "-o", tmp_path / "own")
    assert status == 1 and "needs a chat template" in err and not (tmp_path / "own").exists()


# Never slow without a word.


def test_generate_says_which_tree_it_uses_where_none_was_tuned(medusa, own, tmp_path):
    heads = tmp_path / "heads"
    heads.mkdir()
    for file in (own / "heads").iterdir():
        (heads / file.name).write_bytes(file.read_bytes())
    ask = ["generate", own / "text", "x = ", "--heads", heads, "-n", "12"]
    assert "these heads have no tree file: a dynamic tree of 16 nodes, maybe slower" in medusa(*ask)[2]
    save_tree(MedusaTree.dense([2, 2]), heads / "medusa_tree.json")
    assert "7 nodes, is not tuned" in medusa(*ask)[2]
    (heads / "tuning.json").write_text(json.dumps({"made_with": {"dtype": "bfloat16"}}))
    assert "was tuned in bfloat16 and runs in float32" in medusa(*ask)[2]
    save_tree(MedusaTree([]), heads / "medusa_tree.json")
    assert "the root alone, as medusa tune chose: no tree paid. This is plain decoding" in medusa(*ask)[2]
    assert "tree" not in medusa(*ask, "--tree", "root")[2].replace("tokens per step", "")


def test_heads_that_are_seldom_right_are_said_to_be_slow(medusa, own):
    err = medusa("generate", own / "text", "x = ", "--heads", own / "heads", "-n", "24")[2]
    assert "a tree of 16 nodes with so few accepted guesses is likely slower than --tree root" in err


def test_the_root_alone_needs_no_heads(medusa, own):
    status, out, _ = medusa("generate", own / "text", "x = ", "--tree", "root", "-n", "4", "--json")
    assert status == 0 and json.loads(out)["acceleration_rate"] == 1
    status, _, err = medusa("demo", own / "text", "-p", "x = ", "--tree", "root", "-n", "4", "--no-compile")
    assert status == 0, err


# Chat models are asked.


def test_generate_asks_a_chat_model_and_continues_where_told_to(medusa, own, embedded_tokenizer):
    def prompt_tokens(*more: str) -> int:
        status, out, err = medusa("generate", *more, "--tree", "root", "-n", "1", "--json", stdin="Hi there\n")
        assert status == 0, err
        return json.loads(out)["prompt_tokens"]

    asked, plain = (len(embedded_tokenizer(text)["input_ids"]) for text in ("user: Hi there\nassistant:", "Hi there\n"))
    assert prompt_tokens(own / "chat") == prompt_tokens(own / "chat", "--chat") == asked
    assert prompt_tokens(own / "chat", "--no-chat") == prompt_tokens(own / "text") == plain
    assert "has no chat template" in medusa("generate", own / "text", "x", "--chat", "--tree", "root")[2]


# Training tells how it goes.


def test_training_on_few_rows_tells_its_loss_and_leaves_tree_and_card(medusa, own, tmp_path):
    data = lines(tmp_path / "data.jsonl", *({"text": f"def f{n}(x):\n    return x + {n}\n" * 4} for n in range(4)))
    heads = tmp_path / "heads"
    few = ["--num-heads", "2", "--max-steps", "3"]
    status, out, err = medusa("train", own / "text", "--data", data, "-o", heads, *few)
    assert status == 0, err
    assert "fewer than 10 rows are too few to hold any out: the heads are evaluated on training rows" in err
    assert "step 1 of 3: loss " in err and "step 2 of 3: loss " in err and "head accuracies " in err
    assert "head 2: top-1" in out
    assert (heads / "medusa_tree.json").is_file()
    assert "tokens of training rows, which flatters the heads" in (heads / "README.md").read_text()
    record = json.loads((heads / "training.json").read_text())
    assert record["measured_on"] == "rows that were learnt" and "head1_top1" in record["log"][0]


@pytest.mark.parametrize("method", ["medusa-1", "sft"])
def test_trains_help_is_a_page_with_the_values_of_the_method(medusa, monkeypatch, method):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = medusa("train", "--method", method, "--help")
    shown = out.splitlines()
    assert status == 0 and len(shown) <= 125 and max(map(len, shown)) <= 80
    values = resolve(method, {})
    for name in FIELDS:
        (line,) = [line for line in shown if line.split()[:1] == [f"--{name.replace('_', '-')}"]]
        value = getattr(values, name)
        if type(value) in (int, float):
            assert float(line.split()[1]) == value
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(FIELDS)


# What is shown fits.


def test_a_table_too_wide_goes_on_below_and_breaks_no_figure():
    header = ["decoder", *(f"figure of {n}" for n in range(9))]
    rows = [[name, *(f"{n}.25 (1.00-{n}.50)" for n in range(9))] for name in ("plain", "medusa own tree")]
    screen = Console(width=80, file=io.StringIO(), record=True)
    found = showing.tables(80, header, rows, title="All", keys=1)
    screen.print(*found)
    text = screen.export_text()
    assert len(found) > 1 and text.count("medusa own tree") == len(found)
    assert all(text.count(f"{n}.25 (1.00-{n}.50)") == 2 for n in range(9))
    assert max(map(len, text.splitlines())) <= 80
    assert len(showing.tables(400, header, rows)) == 1


def test_streamed_text_is_broken_between_words_on_a_terminal_and_left_alone_elsewhere():
    text = "one two  three four\nfive sixteen seventeen"

    def shown(**options) -> str:
        out = Console(file=io.StringIO(), width=12, **options)
        words = showing.Words(out)
        for piece in (text[n : n + 3] for n in range(0, len(text), 3)):
            words.put(piece)
        words.end()
        return out.file.getvalue()

    on_terminal = shown(force_terminal=True, color_system=None)
    assert on_terminal.split() == text.split() and all(len(line.rstrip()) <= 12 for line in on_terminal.splitlines())
    assert shown() == text + "\n"


def test_simulate_and_bench_fit_eighty_columns(medusa, own, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = medusa("simulate", "llama-7b", "--hardware", "rtx-4090", "--batch", "1", "--batch", "8")
    assert status == 0 and max(map(len, out.splitlines())) <= 80 and "…" not in out and "best size" in out
    prompts = lines(tmp_path / "prompts.jsonl", *ASKED)
    status, out, err = medusa(
        "bench", own / "text", "--heads", own / "heads", "--prompts", prompts, "-n", "4", "-o", tmp_path / "bench"
    )
    assert status == 0 and max(map(len, out.splitlines())) <= 80 and "…" not in out, err
    assert "vs plain" in out and "overhead" in out


def test_inspect_tells_a_fact_a_line_of_backbone_and_heads(medusa, own):
    status, out, err = medusa("inspect", own / "chat")
    facts = dict(line.strip().split("  ", 1) for line in out.splitlines() if line.startswith("  "))
    facts = {name: value.strip() for name, value in facts.items()}
    assert status == 0 and facts["architecture"] == "llama" and facts["context"] == "512" and facts["chat template"] == "yes"
    assert "no heads here" in err
    status, out, err = medusa("inspect", own / "heads")
    assert "num heads" in out and "ours, as medusa train writes them" in out and "no tree file beside the heads" in err
    assert "None" not in out and "[]" not in out


def test_the_demo_shows_one_answer_twice_and_then_the_figures(medusa, own):
    status, out, err = medusa(
        "demo", own / "chat", "--heads", own / "heads", "--limit", "2", "-n", "8", "--no-compile", "--dtype", "float32"
    )
    assert status == 0, err
    assert out.startswith("> Explain in a few sentences why the sky is blue.\n")
    plain, medusa_ = out.split("plainly: one token per step")[1].split("with Medusa: tokens of one step have one colour")
    assert plain.strip().rsplit("\n\n", 1)[0] == medusa_.strip().split("\n\n")[0]
    assert out.count("tokens/s,") == 2 and "identical output in float32: yes" in out and "2 prompts" in out


def test_the_demo_is_of_the_embedded_model_where_smollm2_is_not_installed(medusa, monkeypatch):
    monkeypatch.setattr("medusa.checkpoints.hub.SMOLLM2_PACKAGE", "no_such_package_here")
    status, out, err = medusa("demo", "--limit", "1", "-n", "8", "--no-compile", "--no-float32-check", "--json")
    assert status == 0 and "smollm2 is not installed here, so the demo uses `embedded`" in err
    assert json.loads(out)["model"] == "embedded"


def test_a_judge_that_is_not_there_prints_no_table(medusa, tmp_path, monkeypatch):
    pytest.importorskip("httpx")
    monkeypatch.setattr("medusa.data.endpoint.LONGEST_WAIT", 0.0)
    answers = lines(
        tmp_path / "answers.jsonl",
        {"id": "1", "category": "all", "turns": ["Hi"], "answers": {"plain": ["Ho"]}, "references": []},
    )
    status, out, err = medusa("judge", answers, "--endpoint", "http://127.0.0.1:9/v1", "--judge-model", "m", "--tries", "1")
    assert status == 1 and out.strip() == "" and "1 answers have no grade" in err
