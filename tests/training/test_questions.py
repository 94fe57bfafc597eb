"""Claims about questions that the model writes itself."""

import json

import pytest

from data.test_templates import CHATML, VICUNA, tokenizer_with
from medusa import MedusaModel
from medusa.errors import InvalidInput
from medusa.training.questions import Filter, write_questions
from tiny import tiny_backbone


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(CHATML)


@pytest.fixture(scope="module")
def model(tokenizer):
    backbone = tiny_backbone(vocab_size=len(tokenizer), max_position_embeddings=512, gain=1.0)
    backbone.generation_config.eos_token_id = list(range(0, len(tokenizer), 16))  # texts end after some tokens
    return MedusaModel(backbone)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Why?", "too short or too long"),
        ("why " * 600, "too short or too long"),
        ("=== ((( ))) +++ a b c", "not in words"),
        ("What is \ufffd in the word?", "not in words"),
        ("tell me tell me tell me tell me tell me tell me", "repeating itself"),
    ],
)
def test_junk_is_refused_with_the_reason(text, reason):
    keeps = Filter()
    assert not keeps.takes(text) and keeps.refused == {reason: 1}


def test_a_question_much_like_another_is_refused_and_others_are_kept():
    keeps = Filter()
    assert keeps.takes("Can you help me plan a party for my friends?")
    assert not keeps.takes("can you help me plan a party for my parents")
    assert keeps.takes("What is the capital of France?")
    assert keeps.takes("Wie heißt die Hauptstadt von Frankreich?")
    assert keeps.takes("法国 的 首都 在 哪里")
    assert keeps.refused == {"much like another": 1}


def test_questions_are_the_models_and_do_not_depend_on_the_rows_or_on_a_stop(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr(Filter, "takes", lambda self, text: bool(text))
    texts = []
    for name, rows in (("a", 2), ("b", 7)):
        path = write_questions(model, tokenizer, tmp_path / name, 6, rows, seed=3)
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    records = [json.loads(line) for line in texts[0].splitlines()]
    assert len(records) == 6 and all(r["messages"][0]["role"] == "user" for r in records)
    short = tmp_path / "c" / "self" / "questions.jsonl"
    short.parent.mkdir(parents=True)
    short.write_text("".join(line + "\n" for line in texts[0].splitlines()[:2]) + '{"id": "half')
    write_questions(model, tokenizer, tmp_path / "c", 6, 3, seed=3)
    assert short.read_text() == texts[0]
    assert write_questions(model, tokenizer, tmp_path / "d", 6, 3, seed=4).read_text() != texts[0]


def test_a_model_that_writes_nothing_worth_keeping_is_an_error(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr(Filter, "takes", lambda self, text: self._refuse("not in words"))
    with pytest.raises(InvalidInput, match=r"of 8 questions 0 were kept, expected 2: .*not in words"):
        write_questions(model, tokenizer, tmp_path, 2, 4)


def test_templates_that_do_not_end_the_users_turns_are_refused(tmp_path, model):
    with pytest.raises(InvalidInput, match="--data self needs a chat template"):
        write_questions(model, tokenizer_with(VICUNA), tmp_path, 1, 1)
