"""Prompts as token ids: conversations formatted with the chat template, plain texts, batches padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medusa.data.samples import Message
from medusa.data.templates import opening
from medusa.errors import InvalidInput
from medusa.runs.files import is_unicode


def as_conversation(tokenizer: Any, text: str, chat: bool | None, model: str) -> list[Message] | None:
    """A prompt as a conversation of one turn; None if it is a text to be continued. `chat` says which; None: if the tokenizer
    has a chat template. InvalidInput, with the model's name, if it is required but there is none."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise InvalidInput(f"{model} has no chat template: it continues text; drop --chat or use a chat model")
    return [{"role": "user", "content": text.strip("\n")}] if has_template and chat is not False else None


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message]) -> list[int]:
    """Token ids of a text, or of a conversation up to the assistant's next turn; InvalidInput if it is not valid Unicode, or
    the template refuses it."""
    if not all(map(is_unicode, [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt])):
        raise InvalidInput("the prompt is not valid Unicode: bytes that are not UTF-8, or half of a surrogate pair")
    if isinstance(prompt, str):
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    else:
        ids = opening_ids(tokenizer, prompt, "assistant")
    if not ids and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]  # an empty prompt begins a text
    return list(ids)


def opening_ids(tokenizer: Any, messages: Sequence[Message], speaker: str, what: str = "a conversation") -> list[int]:
    """Token ids of a conversation up to the next turn of a speaker, "assistant" or "user"; see `opening`."""
    return list(tokenizer(opening(tokenizer, messages, speaker, what), add_special_tokens=False, verbose=False)["input_ids"])


def left_padded(prompts: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts as one batch, (B, P) long, with its attention mask, (B, P) long."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
