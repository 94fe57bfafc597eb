"""Prompts: the token ids of a conversation under the model's chat template, or of a text."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from medusa.data.templates import end_of_turn
from medusa.errors import InvalidInput, one_line
from medusa.serving.problems import Problem
from medusa.serving.schemas import Message, Tool


def longest_token(tokenizer: Any) -> int:
    """The most characters of a text that one token stands for."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def _check_length(text: str, most: int | None, param: str) -> None:
    """Refuse a text that is too long for the model whatever its tokens are: tokenising it would hold a thread for seconds."""
    if most is not None and len(text) > most:
        raise Problem(
            f"the prompt has {len(text)} characters, and this model's context has room for at most {most}; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )


def text_ids(tokenizer: Any, text: str, special: bool = True, most: int | None = None) -> list[int]:
    """The ids of a text to be continued.

    Args:
        most: number of characters that the text may have.

    Raises:
        Problem: there is no token to begin with, or the text is too long.
    """
    _check_length(text, most, "prompt")
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]  # an empty prompt begins a text
    if not ids:
        raise Problem("prompt: the prompt has no token; give a text", param="prompt", code="invalid_value")
    return ids


def chat_ids(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    extra: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    most: int | None = None,
) -> list[int]:
    """The ids of a conversation under the model's chat template.

    Args:
        tools: the functions that the model may call.
        extra: the template's own variables.
        most: number of characters that the conversation may have under the template.

    Raises:
        Problem: there is no template, it refuses the conversation, or the conversation is too long.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise Problem(
            "this model has no chat template: it continues text; send the text to /v1/completions", code="no_chat_template"
        )
    reserved = inspect.signature(tokenizer.apply_chat_template).parameters.keys() | {"messages"}
    if taken := sorted(reserved & (extra or {}).keys()):
        raise Problem(f"chat_template_kwargs: {taken[0]} is not a variable of the template", param="chat_template_kwargs")
    described = [tool.model_dump(exclude_none=True, by_alias=True) for tool in tools or ()]
    turns = [_turn(message) for message in messages]
    if described and not knows_tools(tokenizer):
        turns = _with_tools(turns, described)
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tools=described or None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **(extra or {}),
        )
    except Exception as error:  # a template is a program
        raise Problem(f"messages: the chat template refuses them: {one_line(error)}", param="messages") from None
    _check_length(text, most, "messages")
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise Problem("messages: the chat template makes no text of them", param="messages")
    return ids


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it: with text, and the arguments of calls as objects."""
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function)},
            }
            for call in message.tool_calls
        ]
    return turn


def _arguments(function: Any) -> dict[str, Any]:
    try:
        found = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Problem("messages: the arguments of a tool call are not a JSON object", param="messages")
    return found


def knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template shows tools to the model."""
    return "tools" in _template(tokenizer)


def _template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else json.dumps(template)


def _with_tools(turns: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with the tools described in the system message, for a template that would not show them."""
    described = "You may call these functions:\n" + "\n".join(json.dumps(tool["function"]) for tool in tools)
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{described}"}, *turns[1:]]
    return [{"role": "system", "content": described}, *turns]


def call_style(tokenizer: Any) -> str | None:
    """How the model writes the calls that it makes by itself: "hermes", "llama", or None if that is not known."""
    template = _template(tokenizer) if getattr(tokenizer, "chat_template", None) else ""
    if "<tool_call>" in template:
        return "hermes"
    if '"parameters":' in template and ("<|python_tag|>" in template or "<|eom_id|>" in template or "ipython" in template):
        return "llama"
    return None


def ends_of_turns(tokenizer: Any) -> tuple[int, ...]:
    """The ids with which the template ends an assistant's turn, beside those that end a text; empty if they are unknown."""
    try:
        return tuple(end_of_turn(tokenizer)) if getattr(tokenizer, "chat_template", None) else ()
    except InvalidInput:  # a template that rewrites the turns: the model's own eos must do
        return ()
