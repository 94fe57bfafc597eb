"""Claims about texts as they arrive: stop strings, held-back characters, bytes of tokens, calls of tools."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from medusa.generation.text import Detokenizer
from medusa.serving.pieces import AnswerText, TokenTexts
from medusa.serving.tools import Reading
from running import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = st.text(alphabet="abé<>😀 ", max_size=30)


def arrive(text, stops, **options):
    """A text, token by token, and the safe prefixes that were seen on the way."""
    content, seen = AnswerText(Detokenizer(TOKENIZER), stops, **options), []
    for token in TOKENIZER(text).input_ids:
        if content.put(token):
            break
        seen.append(content.text[: content.safe])
    content.end()
    return content, seen


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(st.text(alphabet="abé😀", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_its_first_stop_string_and_nothing_sent_is_taken_back(text, stops):
    content, seen = arrive(text, stops)
    # The first to be complete; of several, the one that begins first.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert content.text == (text[: min(ends)[1]] if ends else text)
    assert all(content.text.startswith(part) for part in seen)
    assert "".join(piece.text for piece in content.pieces).startswith(content.text)


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_pieces_know_where_they_begin(text):
    content, _ = arrive(text, [])
    at = 0
    for piece in content.pieces:
        assert piece.start == at
        at += len(piece.text)
    assert at == len(content.text)


def test_a_stop_string_may_be_kept_and_may_have_to_wait():
    assert arrive("one, two, three", [","], include_stop=True)[0].text == "one,"
    assert arrive("one, two, three", [","], min_tokens=4)[0].text == "one, two"
    content, _ = arrive("one", ["three"])
    assert content.text == "one" and content.stopped is None


def test_the_bytes_of_all_tokens_are_those_of_the_text(tokenizer, embedded_tokenizer):
    text = "def f(x):\n    return 'é😀' # done"
    for each in (tokenizer, embedded_tokenizer):
        texts = TokenTexts(each)
        assert b"".join(texts.bytes(token) for token in each(text, add_special_tokens=False).input_ids) == text.encode()
    texts = TokenTexts(tokenizer)
    assert texts.name(0xC3) == "bytes:\\xc3" and texts.text(0xC3) == "\ufffd" and texts.name(257) == "<|im_end|>"


CALL = '{"name": "f", "arguments": {"a": "<tool_call>é"}}'.replace("<tool_call>", "x")
ANSWERS = [
    "Just text.",
    f"<tool_call>\n{CALL}\n</tool_call>",
    f"I will call.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>",
    f"<tool_call>\n{CALL}",
    "<tool_call>\nnot json\n</tool_call> after",
    "a < b and <tool is text",
    CALL,
    '{"name": "f", "parameters": {}}',
    "[" + CALL + "," + CALL + "]",
    '{"no": "call"}',
    "",
    "  \n",
]


@pytest.mark.parametrize("style", [None, "hermes", "llama", "required", "named"])
@pytest.mark.parametrize("text", ANSWERS)
def test_every_chunking_gives_the_same_content_and_calls(style, text):
    read = Reading(style, "f")
    whole = read(text, complete=True)
    for end in range(len(text) + 1):  # every chunking shows some of these prefixes
        part = read(text[:end], complete=False)
        assert whole.content.startswith(part.content)
        assert whole.calls[: len(part.calls)] == part.calls


def test_calls_are_found():
    assert [call.name for call in Reading("hermes")(ANSWERS[2], True).calls] == ["f", "f"]
    assert Reading("hermes")(ANSWERS[2], True).content == "I will call."
    assert json.loads(Reading("hermes")(ANSWERS[3], True).calls[0].arguments) == {"a": "xé"}
    assert Reading("hermes")(ANSWERS[4], True).content == ANSWERS[4] and not Reading("hermes")(ANSWERS[4], True).calls
    assert Reading("llama")(ANSWERS[7], True).calls[0].arguments == "{}"
    assert Reading("llama")(ANSWERS[9], True).content == ANSWERS[9]
    assert len(Reading("required")(ANSWERS[8], True).calls) == 2
    assert Reading("named", "g")('{"a":', True).calls[0].arguments == '{"a":'
