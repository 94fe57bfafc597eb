"""Chat templates: a conversation as token ids, with a mask of those that the assistant generates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from medusa.data.samples import Message
from medusa.errors import InvalidInput, one_line

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_STAND_IN = "ASSISTANT5P34KS{}HERE"  # letters and digits, which no template trims or escapes


def encode_conversation(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """A conversation under the tokenizer's chat template: its token ids and their loss mask.

    The loss mask is true for what the assistant would generate: the content of its turns and the special token that ends them,
    but neither its header nor the line break after its turn. A template with `{% generation %}` markers defines the mask. Any
    other template is rendered a second time with stand-ins in place of the assistant's contents, which shows what the template
    writes around them.

    Raises:
        InvalidInput: no chat template, a slow tokenizer, a template that refuses the conversation or changes the contents.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidInput("masking the prompt needs a fast tokenizer (tokenizers library); this one is slow")
    if not tokenizer.chat_template:
        raise InvalidInput("the tokenizer has no chat template; give it one, or give data as 'text' or 'prompt'/'completion'")
    templates = tokenizer.chat_template  # of several, the default
    if _GENERATION.search(templates if isinstance(templates, str) else templates.get("default", "")):
        masked: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = _apply(tokenizer, messages, **masked)
        return list(encoded["input_ids"]), [bool(said) for said in encoded["assistant_masks"]]
    text, spans = render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), overlaps(encoded["offset_mapping"], spans)


def render(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation's text and the spans of characters in it that the assistant generates."""
    text = _apply(tokenizer, messages)
    assistant = [message for message in messages if message["role"] == "assistant"]
    names = iter(map(_STAND_IN.format, range(len(assistant))))
    standing_in = [{**m, "content": next(names)} if m["role"] == "assistant" else m for m in messages]
    pieces = re.split(_STAND_IN.format(r"\d+"), _apply(tokenizer, standing_in))
    if len(pieces) != len(assistant) + 1:
        raise InvalidInput(
            f"the chat template shows {len(pieces) - 1} of {len(assistant)} assistant turns; "
            "mark them with {% generation %} … {% endgeneration %} in the template"
        )
    special = sorted({*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())} - {""}, key=len)
    # Without a special token: the line that ends every turn of the assistant.
    line = pieces[-1].strip().partition("\n")[0]
    if line and not any(token in pieces[-1] for token in special) and all(p.lstrip().startswith(line) for p in pieces[1:]):
        special.append(line)
    closing = re.compile(r"\s*(" + "|".join(map(re.escape, reversed(special))) + ")") if special else None
    spans, at = [], len(pieces[0])
    matched = text.startswith(pieces[0])
    for message, after in zip(assistant, pieces[1:], strict=True):
        last = after is pieces[-1]
        content = message["content"]
        rendered = (content, content.strip(), content.rstrip(), content.lstrip())
        end = next((at + len(c) for c in rendered if text.startswith(c + after, at)), None)
        if end is None:  # changed by the template: it ends where what follows it begins
            end = len(text) - len(after) if last else text.find(after, at)
            matched = matched and end >= at and text.startswith(after, end)
        # The turn's end is in the loss mask too, unless it belongs to the next turn; then a conversation does not end with it.
        ending = closing.match(after) if closing else None
        final = closing.match(pieces[-1]) if closing else None
        closed = len(ending[0]) if ending and final and ending[1] == final[1] else 0
        spans.append((at, end + closed))
        at = end + len(after)
    if not matched or at != len(text):
        # The template separates the last turn's reasoning: the mask covers everything after the generation prompt. It removes
        # the reasoning of earlier turns, whose remaining text is not what was generated.
        prompt = _apply(tokenizer, messages[:-1], add_generation_prompt=True)
        if text.startswith(prompt) and text.endswith(pieces[-1]):
            ending = closing.match(pieces[-1]) if closing else None
            return text, [(len(prompt), len(text) - len(pieces[-1]) + (len(ending[0]) if ending else 0))]
        raise InvalidInput(
            "the chat template rewrites the assistant's turns, so they cannot be found in its output; "
            "mark them with {% generation %} … {% endgeneration %} in the template"
        )
    return text, spans


def _apply(tokenizer: Any, messages: Sequence[Message], what: str = "a conversation", **options: Any) -> Any:
    """What the template makes of a conversation; InvalidInput, with the name of the conversation, if it refuses it."""
    try:
        return tokenizer.apply_chat_template(list(messages), **{"tokenize": False, **options})
    except Exception as error:  # a template is a program
        where = getattr(tokenizer, "name_or_path", "")
        raise InvalidInput(f"the chat template{where and f' of {where}'} refuses {what}: {one_line(error)}") from None


def overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token, given by its span of characters, whether it overlaps one of the spans; both lists are in order."""
    inside, at = [], 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        inside.append(at < len(spans) and end > start and end > spans[at][0])
    return inside


def opening(tokenizer: Any, messages: Sequence[Message], speaker: str, what: str = "a conversation") -> str:
    """A conversation's text up to where the next turn of a speaker, "assistant" or "user", begins; InvalidInput, which names
    what the conversation is, if the template refuses it."""
    if speaker == "assistant":
        return _apply(tokenizer, messages, what, add_generation_prompt=True)
    following = [*messages, {"role": speaker, "content": _STAND_IN.format(0)}]
    return _apply(tokenizer, following).partition(_STAND_IN.format(0))[0].rstrip(" ")  # a word begins with its own space


def end_of_turn(tokenizer: Any) -> list[int]:
    """The id of the special token with which the template ends an assistant's turn, in a list; empty if there is none."""
    if not tokenizer.chat_template:
        return []
    asked, answered = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    ids, loss_mask = encode_conversation(tokenizer, [asked, answered, asked, answered])
    ends = [token for token, said in zip(ids, loss_mask, strict=True) if said and token in tokenizer.added_tokens_decoder]
    return ends[-1:]


def ends_of_turns(tokenizer: Any, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """The ids that end a turn: those that end a text, and the template's own."""
    return tuple(sorted({*eos_token_ids, *end_of_turn(tokenizer)}))


def ends_users_turns(tokenizer: Any) -> bool:
    """Whether the template ends a user's turn with a special token, so that a model that writes such a turn can be stopped."""
    asked, answered = _STAND_IN.format(0), _STAND_IN.format(1)
    text = _apply(tokenizer, [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}])
    between = text.partition(asked)[2].partition(answered)[0]
    return any(str(token) in between for token in tokenizer.added_tokens_decoder.values())
