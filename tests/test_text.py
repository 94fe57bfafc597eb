"""Claims about incremental detokenising."""

import pytest

from medusa.text import Detokenizer

TEXT = "def naïve(x):\n    return 'π≈3.14 — 你好 🎉'  # done\n\n\nclass A:\n    pass\n"


class Counting:
    """A tokenizer that counts the tokens it is asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.longest = tokenizer, 0

    def decode(self, ids, **options):
        self.longest = max(self.longest, len(ids))
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_pieces_make_up_the_text_and_split_no_character(embedded_tokenizer, group):
    ids = embedded_tokenizer(TEXT)["input_ids"]
    detokenizer = Detokenizer(embedded_tokenizer)
    pieces = [detokenizer.put(ids[i : i + group]) for i in range(0, len(ids), group)]
    assert "".join(pieces) + detokenizer.end() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(TEXT) / 3  # some characters take several tokens, or this shows nothing


def test_whole_text_is_never_decoded_again(embedded_tokenizer):
    counting = Counting(embedded_tokenizer)
    detokenizer = Detokenizer(counting)
    for token in embedded_tokenizer(TEXT * 20)["input_ids"]:
        detokenizer.put([token])
    assert counting.longest < 12


def test_unfinished_character_comes_out_at_the_end(embedded_tokenizer):
    ids = embedded_tokenizer("🎉")["input_ids"]
    assert len(ids) > 1
    detokenizer = Detokenizer(embedded_tokenizer)
    assert detokenizer.put(ids[:-1]) == ""
    assert "\ufffd" in detokenizer.end()


def test_prompt_may_end_inside_a_character(embedded_tokenizer):
    ids = embedded_tokenizer("🎉")["input_ids"]
    rest = embedded_tokenizer("abc")["input_ids"]
    detokenizer = Detokenizer(embedded_tokenizer, ids[:2])
    assert detokenizer.put(ids[2:]) + detokenizer.put(rest) + detokenizer.end() == "🎉abc"


def test_bytes_that_are_no_character_hold_nothing_back(embedded_tokenizer):
    broken = embedded_tokenizer("🎉")["input_ids"][-1]  # a continuation byte
    counting = Counting(embedded_tokenizer)
    detokenizer = Detokenizer(counting)
    text = detokenizer.put([broken] * 100 + embedded_tokenizer("ok")["input_ids"])
    assert text.endswith("ok") and counting.longest < 12


def test_special_tokens_hold_nothing_back(embedded_tokenizer):
    counting = Counting(embedded_tokenizer)
    detokenizer = Detokenizer(counting)
    assert detokenizer.put([0] * 50 + embedded_tokenizer("ok")["input_ids"]) == "ok" and counting.longest < 12
