"""Claims about broken files: each is named in one line, the exit code is 1, nothing is half-written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa.checkpoints.writer import save_heads
from medusa.errors import MedusaError
from medusa.training.distillation import Shards
from tiny import random_heads, tiny_backbone

TALK = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat down there"}]}
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>\n{% endfor %}"
OTHER = b'{"weight_map": {"a": 5}, "paths": "x", "model_type": [], "id": {}, "text": 7, "eos_token_id": 0, "pad_token_id": 1}'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def backbone(folder: Path, kind: str) -> None:
    """A whole model with its tokenizer; its weights in a file of some kind."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_backbone(num_hidden_layers=1, hidden_size=32, intermediate_size=32, eos_token_id=0)
    model.save_pretrained(folder)
    words = ["<unk>", "<pad>", "the", "cat", "sat", "down", "there", "<user>", "<assistant>"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if kind == "pytorch_model.bin":
        torch.save(tensors, folder / kind)
        (folder / "model.safetensors").unlink()
    elif kind == "model.safetensors.index.json":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        found = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (folder / kind).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a sound file of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    for kind in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        backbone(folder / kind, kind)
    heads = random_heads(tiny_backbone(hidden_size=32), 2)
    save_heads(heads, folder / "heads")
    (folder / "old").mkdir()
    torch.save(heads.state_dict(), folder / "old" / "medusa_lm_head.pt")
    (folder / "tree.json").write_text(json.dumps({"paths": [[0], [0, 0], [1]]}))
    (folder / "dynamic.json").write_text(json.dumps({"batches": {"1": {"dynamic": {"num_nodes": 4, "depth": 2}}}}))
    (folder / "calibration.json").write_text(json.dumps({"paths": [[[0], 5], [[0, 0], 2]], "positions": 9}))
    (folder / "accuracies.json").write_text(json.dumps({"accuracies": [[0.6, 0.1], [0.3]]}))
    (folder / "data.jsonl").write_text((json.dumps(TALK) + "\n") * 3)
    (folder / "data.json").write_text(json.dumps([TALK] * 3))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([TALK] * 3), folder / "data.parquet")
    (folder / "recipe.yaml").write_text("num_heads: 2\nmax_length: 64\n")
    return folder


WHOLE, PREVIEW = "model.safetensors", ["--data", "data.jsonl", "--preview", "1"]
GENERATE = ["-n", "2", "--tree", "root", "--device", "cpu"]
# The file that is damaged, and a command that reads it.
READERS = {
    "model.safetensors/model.safetensors": ["generate", WHOLE, "the", *GENERATE],
    "pytorch_model.bin/pytorch_model.bin": ["generate", "pytorch_model.bin", "the", *GENERATE],
    "model.safetensors.index.json/model.safetensors.index.json": ["generate", "model.safetensors.index.json", "the", *GENERATE],
    "model.safetensors.index.json/model-00001-of-00001.safetensors": [
        *("generate", "model.safetensors.index.json", "the"),
        *GENERATE,
    ],
    "model.safetensors/config.json": ["generate", WHOLE, "the", *GENERATE],
    "model.safetensors/generation_config.json": ["generate", WHOLE, "the", *GENERATE],
    "model.safetensors/tokenizer.json": ["train", WHOLE, *PREVIEW],
    "model.safetensors/tokenizer_config.json": ["train", WHOLE, *PREVIEW],
    "model.safetensors/chat_template.jinja": ["train", WHOLE, *PREVIEW],
    "heads/medusa_lm_head.safetensors": ["inspect", "heads"],
    "heads/config.json": ["inspect", "heads"],
    "old/medusa_lm_head.pt": ["inspect", "old"],
    "tree.json": ["tree", "tree.json"],
    "dynamic.json": ["tree", "dynamic.json"],
    "calibration.json": ["tree", "--nodes", "4", "--calibration", "calibration.json"],
    "accuracies.json": ["tree", "--nodes", "4", "--accuracies", "accuracies.json"],
    "data.jsonl": ["train", WHOLE, *PREVIEW],
    "data.json": ["train", WHOLE, "--data", "data.json", "--preview", "1"],
    "data.parquet": ["train", WHOLE, "--data", "data.parquet", "--preview", "1"],
    "recipe.yaml": ["train", WHOLE, *PREVIEW, "--config", "recipe.yaml"],
}
DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "cut short": lambda content: content[:-3],
    "emptied": lambda content: b"",
    "a pointer": lambda content: POINTER,
    "bytes": lambda content: b"\xff\xfe\x00\x9c" * 50,
    "a list": lambda content: b"[]",
    "a number": lambda content: b"1" * 5000,
    "nested": lambda content: b"[" * 100_000,
    "of another kind": lambda content: OTHER,
    "in another encoding": lambda content: content.decode("latin-1").encode("utf-16"),
    "a folder": None,
}
JOURNALS = ["samples-00000.jsonl", "distillation.yaml"]
# Damaged so that it cannot be taken for what it was, whatever it was.
HOPELESS = ("bytes", "nested", "a folder")
# Without these there is a tokenizer and there are heads all the same, and a folder of their name is no file.
OPTIONAL = ("model.safetensors/tokenizer_config.json", "heads/config.json")


@pytest.mark.parametrize("name", READERS)
def test_damaged_file_is_named_in_one_line(sound, tmp_path, monkeypatch, medusa, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    file = tmp_path / name
    whole = file.read_bytes()
    code, _, said = medusa(*READERS[name])
    assert code == 0, said  # or the damages show nothing
    for damage in damages(file, whole):
        before = sizes(tmp_path)
        code, _, said = medusa(*READERS[name])
        if code == 0:
            assert damage not in HOPELESS or (name in OPTIONAL and damage == "a folder"), (damage, said)
            continue
        lines = said.strip().splitlines()
        assert code == 1 and len(lines) == 1 and lines[0].startswith("medusa: "), (damage, said)
        assert file.name in said or file.parent.name in said or "chat template" in said, (damage, said)
        assert sizes(tmp_path) == before, damage


@pytest.mark.parametrize("name", JOURNALS)
def test_damaged_journal_is_named_and_left_as_it_is(tmp_path, name):
    file, made_by = tmp_path / name, {"model": "x", "seed": 0}
    shards = Shards(tmp_path, made_by)
    for number in range(3):
        shards.add(f"{number}", TALK)
    whole = file.read_bytes()
    for damage in damages(file, whole):
        before = sizes(tmp_path)
        try:
            kept = Shards(tmp_path, made_by).done
        except MedusaError as error:
            assert name in str(error) or str(tmp_path) in str(error), damage
            assert "\n" not in str(error) and sizes(tmp_path) == before, damage
        else:  # the whole lines of a journal that was cut are kept
            assert damage not in HOPELESS and kept <= set("012"), damage


def damages(file: Path, whole: bytes) -> Iterator[str]:
    """Damage a file in one way after another."""
    for damage, change in DAMAGES.items():
        if file.is_dir():
            file.rmdir()
        if change is None:
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(change(whole))
        yield damage


def sizes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_damages_are_two_hundred():
    assert len([*READERS, *JOURNALS]) * len(DAMAGES) >= 200
