"""Responses: POST /v1/responses, without state, by way of a chat completion."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from medusa.serving.answers import Update
from medusa.serving.calls import Call, Service
from medusa.serving.chat import entry, prepare_chat
from medusa.serving.objects import Answered
from medusa.serving.problems import Problem, problem_of_fields
from medusa.serving.prompts import call_style
from medusa.serving.schemas import Body, ChatRequest, MedusaFields, Name, Text
from medusa.serving.streams import event
from medusa.serving.tools import Called, reading_of

KEPT = (
    "model",
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "parallel_tool_calls",
    "medusa",
)


class FunctionTool(Body):
    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Body):
    type: Literal["function"]
    name: Text


class ResponsesRequest(Body):
    """POST /v1/responses; what it shares with chat completions is checked there."""

    model: Annotated[Text, Field(min_length=1)]
    input: Text | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    include: list[Text] | None = None
    medusa: MedusaFields = Field(default_factory=MedusaFields)
    n: Literal[None] = None
    unsupported = {
        "previous_response_id": "this server keeps no state; send the whole conversation as input",
        "conversation": "this server keeps no state; send the whole conversation as input",
        "background": "this server keeps no state",
        "prompt": "this server keeps no prompts",
    }

    def as_chat(self) -> ChatRequest:
        """The same as a chat completion.

        Raises:
            Problem: the input or a field is malformed.
        """
        chat = {name: getattr(self, name) for name in KEPT if getattr(self, name) is not None}
        chat["messages"] = self._messages()
        chat |= {"max_completion_tokens": self.max_output_tokens, "response_format": _format(self.text)}
        if self.top_logprobs:
            chat |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.tools:
            chat["tools"] = [{"type": "function", "function": _without(tool, "type")} for tool in self.tools]
        if isinstance(self.tool_choice, NamedFunction):
            chat["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tools or self.tool_choice != "auto":
            chat["tool_choice"] = self.tool_choice
        try:
            return ChatRequest.model_validate(chat)
        except ValidationError as error:
            raise problem_of_fields(error.errors()) from None

    def _messages(self) -> list[dict[str, Any]]:
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        for item in items:
            kind = item.get("type", "message")
            if kind == "message":
                messages.append({key: item[key] for key in ("role", "content") if key in item})
            elif kind == "function_call":
                call = {"id": item.get("call_id"), "function": {key: item.get(key) for key in ("name", "arguments")}}
                if messages and messages[-1].get("tool_calls"):
                    messages[-1]["tool_calls"].append(call)
                else:
                    messages.append({"role": "assistant", "tool_calls": [call]})
            elif kind == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
            elif kind != "reasoning":
                raise Problem(f"input: an item of type {str(kind)[:40]!r} is not supported", param="input")
        return messages


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    """The response_format of a `text` field, whose JSON schema is one level higher."""
    found = (text or {}).get("format")
    if not isinstance(found, dict) or found.get("type") != "json_schema":
        return found
    return {"type": "json_schema", "json_schema": {key: value for key, value in found.items() if key != "type"}}


def _without(model: Any, *names: str) -> dict[str, Any]:
    return {key: value for key, value in model.model_dump(exclude_none=True).items() if key not in names}


def prepare_response(service: Service, body: ResponsesRequest) -> list[Call]:
    """The call of a body. Takes milliseconds to seconds: not for the event loop."""
    return prepare_chat(service, body.as_chat())


@dataclass
class Item:
    """An item of the output: a message or a call."""

    id: str
    call: Called | None = None
    call_id: str = ""
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def object(self, status: str) -> dict[str, Any]:
        if self.call is not None:
            arguments = self.call.arguments if status == "completed" else ""
            about = {"call_id": self.call_id, "name": self.call.name, "arguments": arguments}
            return {"type": "function_call", "id": self.id, "status": status, **about}
        content = [] if status == "in_progress" else [self.part()]
        return {"type": "message", "id": self.id, "status": status, "role": "assistant", "content": content}

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}


@dataclass
class ResponseAnswer(Answered):
    """The answer to POST /v1/responses, whole or as events."""

    def __post_init__(self) -> None:
        self._reading = reading_of(self.body.as_chat(), call_style(self.service.tokenizer))
        self._items: list[Item] = []
        self._text = ""
        self._number = -1  # of the last event

    async def whole(self) -> dict[str, Any]:
        """The response object."""
        async for update in self.answers.updates():
            for _ in self._add(update):
                pass
        return self._response(self._status())

    async def chunks(self) -> AsyncIterator[bytes]:
        """The events of a streamed response."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        async for update in self.answers.updates():
            for each in self._add(update):
                yield each
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def _event(self, kind: str, **about: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **about}, kind)

    def _add(self, update: Update) -> Iterator[bytes]:
        """Take a step; gives its events."""
        done = update.finish_reason is not None
        self._text += update.text
        parsed = self._reading(self._text, complete=done)
        message = next((item for item in self._items if item.call is None), None)
        entries = [entry(each, self.service.texts) for each in update.logprobs or ()]
        new = parsed.content[len(message.text) if message else 0 :]
        if message is None and (new or (done and not parsed.calls)):
            message = Item(f"msg_{uuid.uuid4().hex}")
            yield from self._begin(message)
            yield self._event("response.content_part.added", **self._place(message), part=Item("").part())
        if message is not None:
            message.text += new
            message.logprobs += entries
            if new:
                yield self._event("response.output_text.delta", **self._place(message), delta=new, logprobs=entries)
        calls = [item for item in self._items if item.call is not None]
        for call in parsed.calls[len(calls) :]:
            item = Item(f"fc_{uuid.uuid4().hex}", call, f"call_{uuid.uuid4().hex[:24]}")
            yield from self._begin(item)
            where = {"item_id": item.id, "output_index": self._items.index(item)}
            yield self._event("response.function_call_arguments.delta", **where, delta=call.arguments)
            yield self._event("response.function_call_arguments.done", **where, arguments=call.arguments)
            yield self._event("response.output_item.done", output_index=where["output_index"], item=item.object("completed"))
        if done and message is not None:
            place, status = self._place(message), self._status()
            yield self._event("response.output_text.done", **place, text=message.text, logprobs=message.logprobs)
            yield self._event("response.content_part.done", **place, part=message.part())
            yield self._event("response.output_item.done", output_index=place["output_index"], item=message.object(status))

    def _begin(self, item: Item) -> Iterator[bytes]:
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item.object("in_progress"))

    def _place(self, item: Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": self._items.index(item), "content_index": 0}

    def _status(self) -> str:
        return "completed" if self.answers.answers[0].finish_reason == "stop" else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        """The response object, with every field of the interface."""
        body, over = self.body, status != "in_progress"
        choice = body.tool_choice
        return {
            "id": f"resp_{self.request_id}",
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.service.name,
            "previous_response_id": None,
            "instructions": body.instructions,
            "output": [item.object(status if item.call is None else "completed") for item in self._items] if over else [],
            "error": None,
            "tools": [_tool(tool) for tool in body.tools or ()],
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
            "truncation": "disabled",
            "parallel_tool_calls": bool(body.parallel_tool_calls),
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "reasoning": {"effort": None, "summary": None},
            "usage": self._usage() if over else None,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "store": False,
            "background": False,
            "service_tier": "default",
            "metadata": body.metadata or {},
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.answers.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens_details": usage["completion_tokens_details"],
        }


def _tool(tool: FunctionTool) -> dict[str, Any]:
    about = {"description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"type": "function", "name": tool.name, **about}
