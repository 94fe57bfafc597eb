"""Claims about the command line: results to stdout, errors in one line, exit codes, no torch for --help."""

import io
import json
import subprocess
import sys

import pytest
import torch

from medusa import MedusaModel
from medusa.cli import VERBS, main
from medusa.cli.prompting import read_prompt
from medusa.data.prompts import prompt_ids
from medusa.errors import InvalidInput
from tiny import random_heads, random_tree, tiny_backbone


def test_help_lists_the_verbs_and_imports_no_torch():
    code = (
        "import sys; sys.argv = ['medusa', '--help']\n"
        "from medusa.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(medusa, verb):
    done = medusa(verb, "--help")
    assert done.returncode == 0 and "Usage" in done.stdout


def test_generate_json_is_one_object_that_adds_up(medusa, embedded_model, embedded_tokenizer):
    prompt = "import os\n\n\ndef walk(top):\n"
    done = medusa("generate", "embedded", prompt, "-n", "20", "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["new_tokens"] == len(record["token_ids"]) == sum(record["acceptance_lengths"]) == 20
    assert record["steps"] == len(record["acceptance_lengths"])
    assert record["acceleration_rate"] == pytest.approx(20 / record["steps"])
    assert record["finish_reason"] == "length"
    ids = embedded_tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert record["prompt_tokens"] == ids.shape[1]
    wanted = embedded_model.backbone.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert record["token_ids"] == wanted[0, ids.shape[1] :].tolist()
    assert record["text"] == embedded_tokenizer.decode(record["token_ids"])


def test_generate_streams_text_to_stdout_and_figures_to_stderr(medusa):
    done = medusa("generate", "embedded", "-n", "12", "-t", "0.8", "--seed", "3", stdin="class Queue:\n")
    again = medusa("generate", "embedded", "-n", "12", "-t", "0.8", "--seed", "3", "--tree", "root", stdin="class Queue:\n")
    assert done.returncode == 0 and done.stdout.strip()
    assert "tokens/s" in done.stderr and "tokens/s" not in done.stdout
    assert again.returncode == 0


def test_demo_json_has_the_promised_fields(medusa):
    done = medusa("demo", "embedded", "--json", "--limit", "1", "-n", "24", "--no-compile")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["identical_float32"] is True and isinstance(record["identical"], bool)
    assert all(record[name]["tokens_per_second"] > 0 for name in ("generate", "plain", "medusa"))
    assert record["medusa"]["acceleration_rate"] >= 1 and record["medusa"]["overhead"] > 0
    assert record["speedup_vs_plain"] > 0 and record["speedup_vs_generate"] > 0 and record["text"]


def test_inspect_says_what_is_there(medusa):
    record = json.loads(medusa("inspect", "embedded", "--json").stdout)
    assert record["heads"]["num_heads"] == 5 and record["heads"]["hidden_size"] == 384
    assert record["tree"]["nodes"] > 1
    shown = medusa("inspect", "embedded").stdout
    assert max(map(len, shown.splitlines())) < 200  # nothing pads it where there is no terminal
    assert "num nodes" in shown and "num heads" in shown and "context" in shown and "None" not in shown


def test_train_tune_generate_on_ones_own_model(medusa, tmp_path, embedded_tokenizer):
    backbone = tiny_backbone(vocab_size=4096, max_position_embeddings=512, eos_token_id=0)
    backbone.save_pretrained(tmp_path / "model")
    embedded_tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 8}) + "\n" for i in range(20)))
    settings = tmp_path / "recipe.yaml"
    settings.write_text("num_heads: 2\nmax_length: 64\nbatch_size: 4\n")
    model, heads = str(tmp_path / "model"), str(tmp_path / "heads")
    done = medusa(
        "train", model, "--data", str(data), "--output", heads, "--config", str(settings), "--max-steps", "3",
        "--eval-data", str(data), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "eval_head2_top1" in json.loads(done.stdout)["metrics"]
    done = medusa(
        "tune", model, "--heads", heads, "--prompts", str(data), "--limit", "2", "--prompt-tokens", "32", "-n", "16",
        "--nodes", "6", "--rounds", "1", "--always", "--output", f"{heads}/medusa_tree.json", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["chosen"]["1"]["acceleration_rate"] >= 1 and len(record["calibration"]["accuracies"]) == 2
    assert json.loads((tmp_path / "heads" / "medusa_tree.json").read_text()) == record["tree"]
    assert json.loads((tmp_path / "heads" / "calibration.json").read_text())["made_with"] == record["made_with"]
    done = medusa("generate", model, "x = ", "--heads", heads, "-n", "5", "--json")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tiny_folder(tmp_path):
    backbone = tiny_backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    MedusaModel(backbone, random_heads(backbone), random_tree(1, 20)).save_pretrained(tmp_path / "heads")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nobody/nothing", "x"], "is not a folder here and cannot be fetched"),
        (["generate", "embedded", "x", "--tree", "no.json"], "no tree file no.json"),
        (["generate", "embedded", "x", "-n", "5000"], "exceed the context of 1024"),
        (["generate", "embedded", "x", "--prompt-file", "y"], "not both"),
        (["generate", "embedded", "--prompt-file", "no.txt"], "cannot read no.txt"),
        (["chat", "embedded"], "no chat template"),
        (["generate", "embedded", "x", "--chat"], "no chat template"),
        (["generate", "embedded"], "stdin is empty"),
        (["generate", "Once upon a time"], "looks like a prompt; name the model first"),
        (["inspect", "no-such-folder/at-all"], "is not a folder here"),
        (["train", "embedded", "--data", "no.jsonl", "--output", "out"], "no data file no.jsonl"),
        (["tune", "some/model"], "no prompts"),
        (["generate", "embedded", "x", "--tree", "."], "cannot read the tree file"),
        (["generate", "embedded", "x", "--device", "cuda:99"], "is not there"),
        (["generate", "embedded", "x", "--stop", ""], "a stop string is empty"),
        (["generate", "embedded", "x", "--acceptance", "typical"], "needs a temperature"),
        (["generate", "embedded", "x", "--temperature", "inf"], "temperature is inf, expected a finite number"),
        (["simulate", "llama-3-8b", "--hardware", "h100-sxm", "--price", "-3"], "price is -3.0, expected more than 0"),
        (["inspect", __file__], "is no model, heads or tree"),
    ],
)
def test_our_errors_are_one_line_and_exit_1(medusa, arguments, message, tmp_path):
    done = medusa(*arguments)
    assert done.returncode == 1, done.stderr
    assert message in done.stderr and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("medusa: ")


def test_heads_file_that_is_broken_is_one_line(medusa, tiny_folder, embedded_tokenizer):
    embedded_tokenizer.save_pretrained(tiny_folder / "backbone")
    path = tiny_folder / "heads" / "medusa_lm_head.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    done = medusa("generate", str(tiny_folder / "backbone"), "x", "--heads", str(tiny_folder / "heads"), "-n", "8")
    assert done.returncode == 1 and "broken or truncated" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["generate", "--temprature", "1"], "--temprature"),
        (["generate", "embedded", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "embedded", "x", "--dtype", "int3"], "--dtype"),
        (["generate", "embedded", "x", "--acceptance", "all"], "--acceptance"),
        (["demo", "--limit", "0"], "--limit"),
        (["distill", "embedded", "--data", "self", "-o", "out", "--limit", "0"], "--limit"),
        (["train", "embedded", "--data", "x.jsonl", "-o", "out", "--targets", "any"], "--targets"),
        (["train", "embedded", "--data", "x.jsonl"], "--output"),
        (["judge", "x", "--endpoint", "http://x", "--judge-model", "m", "--tries", "0"], "--tries"),
        (["convert", "embedded", "out", "--to", "onnx"], "--to"),
    ],
)
def test_usage_errors_exit_2_and_name_the_option(medusa, monkeypatch, arguments, option):
    monkeypatch.setenv("COLUMNS", "200")
    done = medusa(*arguments)
    assert done.returncode == 2 and option in done.stderr and done.stdout == ""


def test_unknown_key_in_a_recipe_names_the_nearest(medusa, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "recipe.yaml").write_text("learning_rte: 1\n")
    done = medusa(
        "train", "embedded", "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "o"),
        "--config", str(tmp_path / "recipe.yaml"),
    )  # fmt: skip
    assert done.returncode == 1 and "did you mean 'learning_rate'?" in done.stderr


def test_chat_answers_under_the_models_own_template(medusa, tmp_path, embedded_tokenizer):
    backbone = tiny_backbone(vocab_size=4096, max_position_embeddings=512, eos_token_id=0, dtype=torch.float32)
    backbone.save_pretrained(tmp_path)
    MedusaModel(backbone, random_heads(backbone)).save_pretrained(tmp_path / "heads")
    embedded_tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    embedded_tokenizer.save_pretrained(tmp_path)
    embedded_tokenizer.chat_template = None
    done = medusa(
        "chat", str(tmp_path), "--heads", str(tmp_path / "heads"), "-n", "8", stdin="hello\n/reset\n/nonsense\nagain\n/quit\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens per step") == 2 and done.stderr.count("tokens/s") == 2
    assert "/nonsense is not a command: /reset forgets" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_text_that_stdout_cannot_show_ends_no_run(monkeypatch, encoding, embedded_tokenizer):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["medusa", "--help"])
    with pytest.raises(SystemExit):
        main()
    text = "π 你 \udcff"
    out.write(text)
    out.flush()
    assert out.buffer.getvalue().endswith(text.encode(encoding, "backslashreplace"))


def test_prompt_that_is_no_unicode_is_refused(embedded_tokenizer):
    for prompt in ("x \udcff", [{"role": "user", "content": "\ud83d"}]):
        with pytest.raises(InvalidInput, match="the prompt is not valid Unicode"):
            prompt_ids(embedded_tokenizer, prompt)


def test_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompt.txt").write_text("import os", encoding="utf-8-sig")
    assert read_prompt(None, tmp_path / "prompt.txt") == "import os"


def test_output_in_no_file_system_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medusa", "tree", "--dense", "2", "--output", "/proc/medusa/tree.json"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err.startswith("medusa: cannot write /proc/medusa")


def test_preview_shows_rows_as_long_as_training_takes_them(tmp_path, embedded_tokenizer, monkeypatch, capsys):
    tiny_backbone(vocab_size=4096, max_position_embeddings=32).save_pretrained(tmp_path / "model")
    embedded_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "x = 1\n" * 100}) + "\n")
    preview = ["train", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--preview", "1"]
    monkeypatch.setattr(sys, "argv", ["medusa", *preview])
    with pytest.raises(SystemExit):
        main()
    assert ": 32 tokens, 32 learnt" in capsys.readouterr().out
