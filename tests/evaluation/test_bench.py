"""Claims about the bench: decoders answer alike and in turn, every run is kept, and a killed bench goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import torch
from transformers import AutoTokenizer

from data.test_templates import CHATML, GEMMA, tokenizer_with
from medusa import EMBEDDED, MedusaHeads, MedusaModel, MedusaTree
from medusa.cli import main
from medusa.data.prompt_sets import Prompter, Question
from medusa.errors import InvalidInput, MedusaError
from medusa.evaluation.answers import answer_questions, converse, fitting, measurements
from medusa.evaluation.decoders import MedusaDecoder, TransformersDecoder
from medusa.evaluation.quality import Scorer
from medusa.evaluation.report import bench_page, summarise
from medusa.evaluation.verbs import bench
from medusa.runs.records import Journal, claim
from medusa.trees.files import save_tree
from tiny import plain_greedy, random_heads, random_tree, tiny_backbone

TWO_TURNS = Question("a", "writing", ("Tell me", "Go on"), references=("x",))
ONE_TURN = Question("b", "code", ("import os",))
IDS = Question("c", "code", ids=(5, 6, 7))


@pytest.fixture(scope="module")
def plain_tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def model():
    """Its heads say what the LM head says, which is right wherever the model repeats itself."""
    backbone = tiny_backbone(vocab_size=len(tokenizer_with(CHATML)), max_position_embeddings=128)
    return MedusaModel(
        backbone, MedusaHeads.for_lm_head(backbone.get_output_embeddings(), 2, 1, False), MedusaTree.dense([2, 1])
    )


def decoders(model: MedusaModel, new_tokens: int = 12) -> dict:
    return {
        "generate": TransformersDecoder(model, new_tokens),
        "plain": MedusaDecoder(model, new_tokens, MedusaTree([])),
        "medusa": MedusaDecoder(model, new_tokens),
    }


def test_a_later_turn_follows_the_decoders_own_answer(model, plain_tokenizer):
    chatty = tokenizer_with(CHATML)
    for tokenizer in (chatty, plain_tokenizer):
        first = plain_greedy(model.backbone, encoded(tokenizer, "Tell me"), 12)
        if tokenizer.chat_template:
            told = "<|im_start|>user\nTell me<|im_end|>\n<|im_start|>assistant\n"
            text = f"{told}{tokenizer.decode(first, skip_special_tokens=True)}<|im_end|>\n" + told.replace("Tell me", "Go on")
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        else:
            following = tokenizer("\nGo on\n")["input_ids"]
            ids = torch.tensor([[*tokenizer("Tell me")["input_ids"], *first, *following]])
        second = plain_greedy(model.backbone, ids, 12)
        for name, decoder in decoders(model).items():
            decoded = converse(decoder, TWO_TURNS, Prompter(tokenizer, []), room=None)
            assert decoded.tokens == [first, second], name
            assert sum(map(sum, decoded.lengths)) == 24 and 0 < decoded.prefill_seconds < decoded.seconds


def encoded(tokenizer, text: str) -> torch.Tensor:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    return tokenizer(text, return_tensors="pt")["input_ids"]


def test_the_token_that_ends_an_answer_is_no_part_of_the_conversation(plain_tokenizer):
    prompter = Prompter(plain_tokenizer, [9])
    assert prompter.ids(TWO_TURNS, [[5, 9]]) == prompter.ids(TWO_TURNS, [[5]])
    assert prompter.text([5, 9]) == plain_tokenizer.decode([5])


def test_what_does_not_fit_is_left_out_and_a_turn_that_does_not_ends_its_conversation(model, plain_tokenizer):
    prompter, long = Prompter(plain_tokenizer, []), Question("d", "code", ("import os\n" * 99,))
    room = len(prompter.ids(TWO_TURNS, [])) + 12
    assert fitting([TWO_TURNS, long, ONE_TURN], prompter, room) == ([TWO_TURNS, ONE_TURN], [long])
    assert fitting([long], prompter, None) == ([long], [])
    assert [len(converse(d, TWO_TURNS, prompter, room).tokens) for d in decoders(model).values()] == [1, 1, 1]


def test_a_template_that_refuses_is_one_line(model):
    prompter = Prompter(tokenizer_with(GEMMA), [])
    with pytest.raises(InvalidInput, match="refuses question s: System role not supported"):
        prompter.ids(Question("s", "all", ("Hi",), system="Be kind."), [])


def benched(tmp_path, model, tokenizer, rounds: int = 2):
    questions, given = [TWO_TURNS, ONE_TURN, IDS], decoders(model)
    journal = Journal(tmp_path / "runs.jsonl", "run of a bench")
    answer_questions(given, questions, Prompter(tokenizer, []), journal, rounds, room=None)
    return questions, measurements(journal, questions, list(given), rounds)


def test_the_report_counts_what_was_decoded(tmp_path, model, plain_tokenizer):
    questions, measured = benched(tmp_path, model, plain_tokenizer)
    found = summarise(measured, questions, list(measured), Scorer(model, Prompter(plain_tokenizer, [])))
    assert list(found) == ["generate", "plain", "medusa"] and list(found["plain"]) == ["overall", "writing", "code"]
    for name, parts in found.items():
        figures = parts["overall"]
        assert (figures["questions"], figures["answers"], figures["tokens"]) == (3, 4, 48)
        assert figures["identical_to_plain"] == 1.0
        assert figures["tokens"] == sum(int(n) * steps for n, steps in figures["acceptance_lengths"].items())
        assert sum(parts[part]["tokens"] for part in ("writing", "code")) == 48
        assert figures["quality"] == found["plain"]["overall"]["quality"], name  # the same answers
        speed = figures["tokens_per_second"]
        assert speed["low"] <= speed["value"] <= speed["high"]
        assert parts["writing"]["tokens_per_second"]["low"] is None  # one question has no interval
    assert found["plain"]["overall"]["speedup_vs_plain"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    rates = {name: parts["overall"]["acceleration_rate"]["value"] for name, parts in found.items()}
    assert rates["plain"] == rates["generate"] == 1 < rates["medusa"]


def test_outputs_that_differ_are_not_called_identical(tmp_path, model, plain_tokenizer):
    questions, measured = benched(tmp_path, model, plain_tokenizer, rounds=1)
    run = measured["medusa"].items[2][0]
    run.tokens[0][-1] += 1
    found = summarise(measured, questions, ["plain", "medusa"])
    assert found["medusa"]["overall"]["identical_to_plain"] == pytest.approx(2 / 3)
    assert found["medusa"]["code"]["identical_to_plain"] == 0.5 and found["medusa"]["writing"]["identical_to_plain"] == 1.0
    assert "identical_to_plain" not in found["generate"]["overall"]


def test_what_is_in_the_journal_is_not_run_again(tmp_path, model, plain_tokenizer):
    benched(tmp_path, model, plain_tokenizer, rounds=1)
    before = (tmp_path / "runs.jsonl").read_text()
    benched(tmp_path, model, plain_tokenizer, rounds=2)
    after = (tmp_path / "runs.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 2 * len(before.splitlines()) == 18

    class Refusing:
        def prepare(self, ids):
            raise AssertionError("nothing is left to run")

        __call__ = prepare

    journal = Journal(tmp_path / "runs.jsonl", "run of a bench")
    answer_questions(dict.fromkeys(decoders(model), Refusing()), [TWO_TURNS, ONE_TURN, IDS], None, journal, 2, None)


def test_a_folder_made_otherwise_says_all_that_differs(tmp_path):
    claim(tmp_path / "bench.yaml", {"dtype": "float32", "threads": 2, "tree": ((0,), (0, 0))})
    claim(tmp_path / "bench.yaml", {"dtype": "float32", "threads": 2, "tree": ((0,), (0, 0))})
    with pytest.raises(InvalidInput, match="was made with dtype 'float32', not 'bfloat16'; threads 2, not 1; give another"):
        claim(tmp_path / "bench.yaml", {"dtype": "bfloat16", "threads": 1, "tree": ((0,), (0, 0))})


class Page(HTMLParser):
    """What a page loads, and the tags it leaves open."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.loaded += [value for name, value in attributes if name == "src" or (tag == "link" and name == "href")]


def test_the_page_needs_nothing_else(tmp_path, model, plain_tokenizer):
    pytest.importorskip("matplotlib")
    questions, measured = benched(tmp_path, model, plain_tokenizer, rounds=1)
    made = {"model": "<m>", "prompts": "p", "max_new_tokens": 12, "temperature": 0.0, "dtype": "float32", "device": "cpu"}
    record = {
        "made_with": {**made, "threads": 1, "compile": False},
        "rounds": 1,
        "left_out": ["d"],
        "decoders": summarise(measured, questions, list(measured)),
    }
    found = Page(bench_page(record).to_html())
    assert not found.loaded and found.seen.count("svg") == 3 and "script" not in found.seen and "m" not in found.seen
    text = bench_page(record).to_markdown()
    assert len(re.findall(r"^\| medusa \|", text, re.MULTILINE)) == 4  # overall, two categories, tokens per step
    assert "Left out, since their prompts do not fit the context: d." in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory, plain_tokenizer):
    """A model, its heads and questions on the disk."""
    path = tmp_path_factory.mktemp("bench")
    backbone = tiny_backbone(vocab_size=len(plain_tokenizer), max_position_embeddings=256)
    backbone.save_pretrained(path / "model")
    plain_tokenizer.save_pretrained(path / "model")
    MedusaModel(backbone, random_heads(backbone, 2), random_tree(2, 12, 2, 4)).save_pretrained(path / "heads")
    save_tree(MedusaTree([(0,), (1,)]), path / "small.json")
    records = [{"question_id": n, "category": "ab"[n % 2], "turns": [f"def f{n}(x):\n    x", "pass"]} for n in range(6)]
    (path / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def command(folder, output, *more: str) -> list[str]:
    given = ["bench", str(folder / "model"), "--heads", str(folder / "heads"), "--output", str(output)]
    return [sys.executable, "-m", "medusa", *given, "--prompts", str(folder / "questions.jsonl"), "-n", "16", *more]


def ran(monkeypatch, *arguments: str, code: int = 0) -> None:
    """`medusa bench` in this process, ending with an exit code."""
    monkeypatch.setattr(sys, "argv", ["medusa", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """The line that `medusa bench` ends with where it exits 1."""
    ran(monkeypatch, *arguments, code=1)
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert said.err.splitlines()[-1].startswith("medusa: ")
    return said.err.splitlines()[-1]


def test_a_bench_that_was_killed_goes_on_with_nothing_lost_and_nothing_twice(tmp_path, folder, monkeypatch, capsys):
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number is another bench
    process = subprocess.Popen(command(folder, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    runs = tmp_path / "runs.jsonl"
    while process.poll() is None and not (runs.exists() and runs.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = runs.read_bytes().splitlines(keepends=True)
    whole = [line for line in before if line.endswith(b"\n")]
    assert 5 <= len(whole) < 18, "killed too late"
    with runs.open("ab") as file:
        file.write(b'{"id": "half of a li')
    ran(monkeypatch, *command(folder, tmp_path, "--json")[4:])
    after = runs.read_bytes().splitlines(keepends=True)
    assert after[: len(whole)] == whole
    ids = [json.loads(line)["id"] for line in after]
    assert len(ids) == len(set(ids)) == 6 * 3
    assert json.loads(capsys.readouterr().out)["decoders"]["medusa"]["overall"]["questions"] == 6

    assert "was made with max_new_tokens 16, not 20; give another folder" in refused(
        monkeypatch, capsys, *command(folder, tmp_path, "-n", "20")[4:]
    )


def test_the_command_writes_its_results_and_names_every_decoder(tmp_path, folder, monkeypatch, capsys):
    chosen = ["generate", "plain", "medusa", "prompt-lookup", "assisted"]
    given = command(
        folder, tmp_path, *(word for name in chosen for word in ("--decoder", name)), "--limit", "2", "--quality", "-t", "0.7",
        "--tree", str(folder / "small.json"), "--tree", "root", "--acceptance", "exact", "--acceptance", "typical",
        "--draft", str(folder / "model"), "--gamma", "2", "--gamma", "3",
    )  # fmt: skip
    ran(monkeypatch, *given[4:])
    record = json.loads((tmp_path / "results.json").read_text())
    wanted = ["generate", "plain", "medusa small", "medusa small typical", "medusa root", "medusa root typical"]
    assert list(record["decoders"]) == [*wanted, "prompt-lookup", "assisted 2", "assisted 3"]
    found = {name: parts["overall"] for name, parts in record["decoders"].items()}
    # Sampled, ours draw alike whatever the tree; transformers' draw otherwise and are not compared.
    assert found["medusa small"]["identical_to_plain"] == found["medusa root"]["identical_to_plain"] == 1.0
    assert "identical_to_plain" not in found["generate"] and found["medusa root"]["acceleration_rate"]["value"] == 1.0
    assert all(figures["quality"]["log_likelihood_per_token"] < 0 for figures in found.values())
    assert {"torch", "cpu", "threads", "backbone", "questions", "dtype"} <= set(record["made_with"])
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["0", "3"] and list(answers[0]["answers"]) == list(found)
    assert all(len(texts) == 2 for answer in answers for texts in answer["answers"].values())
    assert "medusa small typical" in capsys.readouterr().out and (tmp_path / "results.md").is_file()


def test_quality_is_under_the_backbone_as_it_was_before_its_heads_were_trained(tmp_path, folder, monkeypatch):
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from medusa.checkpoints.adapter import attach_adapter, save_adapter

    backbone = AutoModelForCausalLM.from_pretrained(folder / "model")
    original = MedusaModel(AutoModelForCausalLM.from_pretrained(folder / "model"))
    MedusaModel(backbone, random_heads(backbone, 2)).save_pretrained(tmp_path / "heads")
    attach_adapter(backbone, rank=2, alpha=8, dropout=0.0)
    trained = {name: torch.randn_like(p) for name, p in backbone.named_parameters() if "lora_" in name}
    save_adapter(backbone, tmp_path / "heads", None, trained)
    given = [str(folder / "model"), "--heads", str(tmp_path / "heads"), "--output", str(tmp_path), "-n", "8"]
    given += ["--prompts", str(folder / "questions.jsonl"), "--limit", "1", "--decoder", "plain", "--quality"]
    ran(monkeypatch, *given)
    (line,) = (tmp_path / "runs.jsonl").read_text().splitlines()
    question = Question("0", "a", ("def f0(x):\n    x", "pass"))
    prompter = Prompter(AutoTokenizer.from_pretrained(EMBEDDED), original.eos_token_ids)
    tokens = json.loads(line)["tokens"]
    found = json.loads((tmp_path / "results.json").read_text())["decoders"]["plain"]["overall"]["quality"]
    assert found == pytest.approx(Scorer(original, prompter)([question], [tokens]))
    first = prompter.ids(question, [])
    assert tokens[0] != plain_greedy(original.backbone, torch.tensor([first]), 8)  # the adapter does change the model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--decoder", "assisted"], "needs both --decoder assisted and --draft"),
        (["x"], "no prompts; pass --prompts"),
        (["embedded", "--acceptance", "typical"], "typical acceptance needs a temperature"),
        (["embedded", "--prompts", "no.jsonl"], "no data file no.jsonl"),
        (["embedded", "--category", "poems"], "there are no questions of category 'poems'; the categories are code"),
        (["embedded", "-n", "1000"], "no prompt fits the context of 1024 with 1000 new tokens"),
    ],
)
def test_our_errors_are_one_line_and_exit_1(arguments, message, tmp_path, monkeypatch, capsys):
    assert message in refused(monkeypatch, capsys, *arguments, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--decoder", "magic"], "'--decoder'"),
        (["x", "--acceptance", "some"], "'--acceptance'"),
        (["x", "--rounds", "0"], "'--rounds'"),
        (["x", "--gamma", "0"], "'--gamma'"),
    ],
)
def test_values_out_of_range_are_usage_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    ran(monkeypatch, *arguments, "--output", str(tmp_path / "out"), code=2)
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_function_refuses_what_the_command_refuses(tmp_path):
    for options, message in (
        ({"decoders": ["magic"]}, "decoders of a bench contain 'magic', expected generate"),
        ({"rounds": 0}, "at least 1 round"),
        ({"decoder": "medusa"}, "unknown key 'decoder'; did you mean 'decoders'"),
        ({"epsilon": 0.2}, "epsilon and delta are for typical acceptance"),
    ):
        with pytest.raises(MedusaError, match=message):
            bench(output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
