"""Claims about incremental detokenising."""

import functools
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medusa.generation.text import Detokenizer

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


# Tokenizers of the kinds there are: how each spells what has no token of its own.

ALPHABET = list(string.ascii_letters + string.digits + ".,'é你")
WORDS = ["the cat's hat", "naïve café", "你好世界", "🎉🎊 party", "\U00020000\U000e0100 rare"]


def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral and Gemma: a byte piece for every byte of what is not in the vocabulary; spaces are ▁."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *ALPHABET, "th", "the", "▁the"]
    vocab = {name: token for token, name in enumerate(names)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace = decoders.Replace("▁", " ")
    inner.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return inner


def byte_level() -> Tokenizer:
    """As GPT-2: bytes that are merged within words."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _trained(inner)


def across_characters() -> Tokenizer:
    """As tiktoken's: bytes merged wherever they stand together often, so that tokens begin and end inside characters."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _trained(inner)


def _trained(inner: Tokenizer) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False, special_tokens=["<unk>"])
    inner.train_from_iterator([*WORDS, "你世你界你好", "🎊🎉🎈🎊🎉🎈"] * 3, trainer)
    return inner


def word_pieces() -> Tokenizer:
    """As BERT: words, and pieces that go on with one."""
    names = ["<unk>", "the", "cat", "##s", "'", *ALPHABET[:5], *("##" + letter for letter in ALPHABET[:26])]
    inner = Tokenizer(models.WordPiece({name: token for token, name in enumerate(dict.fromkeys(names))}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=True)
    return inner


KINDS = [byte_fallback, byte_level, across_characters, word_pieces]


@functools.cache
def tokenizer_of(kind) -> PreTrainedTokenizerFast:
    inner = kind()
    inner.add_special_tokens([AddedToken("<end>", special=True)])  # that transformers is not told of
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")


def streamed(tokenizer, *parts, prompt=()) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join([detokenizer.put(part) for part in parts]) + detokenizer.end()


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# Characters of every plane and every length in UTF-8, U+FFFD itself among them; no halves of surrogate pairs.
TEXTS = st.text(st.one_of(st.sampled_from(" the你🎉é\ufffd"), st.characters(codec="utf-8")), max_size=24)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_streamed_text_is_the_decoded_text_at_every_cut(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer(text)["input_ids"]
    wanted = whole(tokenizer, ids)
    if kind is not word_pieces and not text.startswith(" "):
        assert wanted == text  # or this shows little
    assert streamed(tokenizer, *([token] for token in ids)) == wanted
    for cut in range(len(ids) + 1):
        assert streamed(tokenizer, ids[:cut], ids[cut:]) == wanted


@pytest.mark.parametrize("kind", [byte_level, across_characters, word_pieces])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_tokens_that_no_text_has_are_streamed_as_they_are_decoded(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=24))
    assert streamed(tokenizer, *([token] for token in ids)) == whole(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(text=TEXTS, data=st.data())
def test_prompt_may_end_anywhere(kind, text, data):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer("the " + text + " 你")["input_ids"]
    cut = data.draw(st.integers(1, len(ids)))
    before, after = Detokenizer(tokenizer).put(ids[:cut]), streamed(tokenizer, ids[cut:], prompt=ids[:cut])
    assert before + after == whole(tokenizer, ids)


@pytest.mark.parametrize("prefix", ["", "the", "你"])
def test_broken_byte_takes_no_whole_character_along(prefix):
    tokenizer = tokenizer_of(byte_fallback)
    broken = tokenizer.convert_tokens_to_ids(["<0x80>", "<0xE4>", "<0xBD>"])
    whole_ones = tokenizer("世界é the")["input_ids"][1:]  # without the space before it
    ids = tokenizer(prefix)["input_ids"] + broken + whole_ones + broken[:1]
    assert streamed(tokenizer, *([token] for token in ids)) == prefix + "\ufffd" * 3 + "世界é the" + "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_character_comes_out_with_its_last_token(kind):
    tokenizer = tokenizer_of(kind)
    if kind is word_pieces:
        pytest.skip("has no token that is part of a character")
    detokenizer, ids = Detokenizer(tokenizer), tokenizer("世你🎉")["input_ids"]
    said = ""
    for token in ids:
        said += detokenizer.put([token])
        assert "\ufffd" not in said
    assert said == "世你🎉"


def test_special_tokens_change_nothing_around_them():
    tokenizer = tokenizer_of(byte_fallback)
    end = tokenizer.convert_tokens_to_ids("<end>")
    ids = [token for known in tokenizer("the 世 the")["input_ids"] for token in (known, *[end] * 9)]
    assert streamed(tokenizer, *([token] for token in ids)) == "the 世 the"
    shown = Detokenizer(tokenizer, skip_special_tokens=False)
    assert shown.put(ids) + shown.end() == tokenizer.decode(ids)
