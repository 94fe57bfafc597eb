"""Tools: the calls that a model writes into its text, and the grammar that makes it write one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from medusa.serving.pieces import settled
from medusa.serving.schemas import ChatRequest, NamedTool, Tool

OPENING, CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Called:
    """A call of a function."""

    name: str
    arguments: str  # a JSON object; text that was cut off may be less


@dataclass(frozen=True)
class Parsed:
    """An answer's text and its calls. For a text that is not complete, the part of them that cannot change."""

    content: str
    calls: tuple[Called, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How calls are read from an answer.

    Args:
        style: "hermes" and "llama" as such models write them; "named" and "required" as our grammar has them; None: no calls.
        name: of the function, for "named".
    """

    style: str | None = None
    name: str = ""

    def __call__(self, text: str, complete: bool) -> Parsed:
        """Read a text from its start. For every longer text, content and calls begin with those of a shorter one."""
        if self.style is None:
            return Parsed(text)
        if self.style == "hermes":
            return _hermes(text, complete)
        if self.style == "llama" and text.strip() and not text.lstrip().startswith(("{", "[")):
            return Parsed(text)
        if not complete:
            return Parsed("")
        if self.style == "named":
            return Parsed("", (Called(self.name, text),))
        calls = _calls(text)
        return Parsed("", calls) if calls else Parsed(text)


def _hermes(text: str, complete: bool) -> Parsed:
    content, *blocks = text.split(OPENING)
    calls: list[Called] = []
    if not blocks:
        return Parsed(content if complete else _certain(content).rstrip())
    for place, block in enumerate(blocks):
        last = place == len(blocks) - 1
        inside, closed, behind = block.partition(CLOSING)
        if not closed and not (complete and last):
            break
        if last and not complete:
            behind = _certain(behind)
        if found := _calls(inside):
            calls += found
            content += behind if behind.strip() else ""
        else:  # not a call: the text as it stands
            content += OPENING + inside + closed + behind
    return Parsed(content.rstrip() if calls or not complete else content, tuple(calls))


def _certain(text: str) -> str:
    """A text without an end that may become the opening tag."""
    return text[: settled(text, [OPENING])]


def _calls(text: str) -> tuple[Called, ...]:
    """The calls in JSON: an object with name and arguments, or a list of them; empty if it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    calls = []
    for each in found if isinstance(found, list) else [found]:
        arguments = each.get("arguments", each.get("parameters")) if isinstance(each, dict) else None
        if not isinstance(arguments, dict) or not isinstance(each.get("name"), str):
            return ()
        calls.append(Called(each["name"], json.dumps(arguments, ensure_ascii=False)))
    return tuple(calls)


def reading_of(body: ChatRequest, style: str | None) -> Reading:
    """How the calls of an answer are read.

    Args:
        style: how the model writes the calls that it makes by itself, see `call_style`.
    """
    if not body.tools or body.tool_choice == "none":
        return Reading()
    if isinstance(body.tool_choice, NamedTool):
        return Reading("named", body.tool_choice.function.name)
    return Reading("required" if body.tool_choice == "required" else style)


def schema_of_calls(body: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema of an answer that has to be a call; None if it may be anything.

    One call is asked for, or several with `parallel_tool_calls: true`.
    """
    if not body.tools or body.tool_choice in (None, "none", "auto"):
        return None
    if isinstance(body.tool_choice, NamedTool):
        named = body.tool_choice.function.name
        return next(_arguments(tool) for tool in body.tools if tool.function.name == named)
    one = {"anyOf": [_call(tool) for tool in body.tools]}
    return {"type": "array", "items": one, "minItems": 1} if body.parallel_tool_calls else one


def _call(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": _arguments(tool)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _arguments(tool: Tool) -> dict[str, Any]:
    """The schema of a function's arguments: those it names, unless it says that it takes others."""
    return {"additionalProperties": False, **(tool.function.parameters or {"type": "object", "properties": {}})}
