"""Claims about `medusa.train` and `medusa.distill` from Python: folders, results, and what they refuse before loading."""

import json

import pytest
import torch

import medusa
from data.test_templates import CHATML, tokenizer_with
from medusa import MedusaModel
from medusa.errors import ConfigError, InvalidInput
from tiny import tiny_backbone


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny chat model."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizer_with(CHATML)
    tiny_backbone(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hi", "Bye", "Hi there")))
    return path


def test_answers_of_distill_train_heads_that_decode(model, prompts, tmp_path):
    made = medusa.distill(model, prompts, tmp_path / "answers", limit=2, max_new_tokens=16, temperature=0.0)
    assert (made.made, made.already, made.failed.total(), made.output) == (2, 0, 0, tmp_path / "answers")
    again = medusa.distill(model, prompts, tmp_path / "answers", max_new_tokens=16, temperature=0.0)
    assert (again.made, again.already) == (1, 2)
    assert again.to_dict() == {**again.to_dict(), "made": 1, "already": 2, "failed": {}, "skipped": {}}
    trained = medusa.train(
        model, data=[made.output], output=tmp_path / "heads", num_heads=2, max_steps=2, batch_size=2, shared_lm_head=True
    )
    assert trained.config.shared_lm_head and "eval_head2_top1" in trained.metrics
    record = json.loads((trained.output / "training.json").read_text())
    assert record["config"]["num_heads"] == 2 and record["metrics"] == trained.metrics
    found = MedusaModel.from_pretrained(model, heads=trained.output)
    assert found.num_heads == 2 and len(found.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)[0]) == 7


def test_options_are_those_of_the_method_then_the_file_then_the_call(tmp_path):
    from medusa.training.verbs import resolve_options

    (tmp_path / "options.yaml").write_text("num_heads: 3\nmax_steps: 7\n")
    found = resolve_options("medusa-2", tmp_path / "options.yaml", {"max_steps": 9})
    assert (found.backbone, found.num_heads, found.max_steps) == ("lora", 3, 9)


def test_wrong_arguments_are_refused_before_anything_is_loaded(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("medusa.checkpoints.loading.load_backbone", None)
    with pytest.raises(ConfigError, match="did you mean 'num_heads'"):
        medusa.train(model, prompts, tmp_path / "new", num_hads=2)
    with pytest.raises(InvalidInput, match="has a 'prompt' and no 'completion'"):
        medusa.train(model, prompts, tmp_path / "new")
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        medusa.distill(model, prompts, tmp_path / "new", temprature=0.5)
    with pytest.raises(InvalidInput, match="limit 0"):
        medusa.distill(model, prompts, tmp_path / "new", limit=0)
    assert not (tmp_path / "new").exists()


def test_rows_to_be_trained_on_can_be_looked_at(model, tmp_path):
    from medusa.training.data import masked_runs
    from medusa.training.verbs import training_rows

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    rows, tokenizer = training_rows(model, tmp_path / "chat.jsonl")
    labelled = [tokenizer.decode(ids) for in_loss, ids in masked_runs(rows.rows[0]) if in_loss]
    assert labelled == ["Ho<|im_end|>"]
