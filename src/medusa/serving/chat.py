"""Chat completions: the objects and the chunks of POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from medusa.serving.answers import Answers, Update
from medusa.serving.calls import Call, Service, make_call
from medusa.serving.pieces import TokenTexts
from medusa.serving.problems import Problem
from medusa.serving.prompts import call_style, chat_ids
from medusa.serving.requests import TokenLogprobs
from medusa.serving.schemas import ChatRequest
from medusa.serving.streams import event
from medusa.serving.tools import Called, Parsed, Reading, reading_of


def prepare_chat(service: Service, body: ChatRequest) -> list[Call]:
    """The call of a body. Takes milliseconds to seconds: not for the event loop."""
    tools = None if body.tool_choice == "none" else body.tools
    style = call_style(service.tokenizer)
    if tools and body.tool_choice in (None, "auto"):
        if style is None:
            raise Problem(
                "tool_choice: this model's own way to write calls is not known; pass 'required', a function or 'none'",
                param="tool_choice",
            )
    elif tools and body.response_format is not None and body.response_format.type != "text":
        raise Problem("response_format: it excludes a tool_choice that asks for a call", param="response_format")
    ids = chat_ids(
        service.tokenizer,
        body.messages,
        tools,
        body.chat_template_kwargs,
        body.add_generation_prompt,
        body.continue_final_message,
    )
    return [make_call(service, body, ids, service.grammars.of(body))]


@dataclass
class Said:
    """What has been sent of one answer."""

    text: str = ""
    content: int = 0
    calls: int = 0


@dataclass
class ChatAnswer:
    """The answer to a chat completion, whole or in chunks."""

    service: Service
    body: ChatRequest
    answers: Answers
    request_id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._reading: Reading = reading_of(self.body, call_style(self.service.tokenizer))
        self._said = [Said() for _ in self.answers.answers]
        self._steps: list[dict[str, Any]] = []

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.service.name,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }

    async def whole(self) -> dict[str, Any]:
        """The chat.completion object."""
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self._said]
        async for update in self.answers.updates():
            self._said[update.index].text += update.text
            logprobs[update.index] += self._logprobs(update)
            if update.trace is not None:
                self._steps.append({"index": update.index, **update.trace})
        choices = []
        for index, (said, answer) in enumerate(zip(self._said, self.answers.answers, strict=True)):
            parsed = self._reading(said.text, complete=True)
            message: dict[str, Any] = {"role": "assistant", "content": parsed.content, "refusal": None, "annotations": []}
            if parsed.calls:
                message["content"] = parsed.content or None
                message["tool_calls"] = [_call(call) for call in parsed.calls]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": {"content": logprobs[index], "refusal": None} if self.body.logprobs else None,
                    "finish_reason": _reason(answer.finish_reason, parsed),
                    "stop_reason": answer.stop_reason,
                }
            )
        found = {**self._object("chat.completion", choices), "usage": self.answers.usage()}
        return {**found, "medusa": {"steps": self._steps}} if self.body.medusa.trace != "none" else found

    async def chunks(self) -> AsyncIterator[bytes]:
        """The chat.completion.chunk events."""
        options = self.body.stream_options
        for index in range(len(self._said)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for update in self.answers.updates():
            for each in self._events(update):
                yield each
        if options is not None and options.include_usage:
            yield event({**self._object("chat.completion.chunk", []), "usage": self.answers.usage()})

    def _events(self, update: Update) -> list[bytes]:
        """The chunks of a step: most often one."""
        said, done = self._said[update.index], update.finish_reason is not None
        said.text += update.text
        parsed = self._reading(said.text, complete=done)
        new, said.content = parsed.content[said.content :], max(said.content, len(parsed.content))
        deltas: list[dict[str, Any]] = [{"content": new}] if new else []
        for place, call in enumerate(parsed.calls[said.calls :], said.calls):
            deltas.append({"tool_calls": [{"index": place, **_call(call)}]})
        said.calls = max(said.calls, len(parsed.calls))
        logprobs = self._logprobs(update)
        if not deltas and (done or logprobs or update.trace is not None):
            deltas.append({})
        events = []
        for place, delta in enumerate(deltas):
            last = place == len(deltas) - 1
            extra: dict[str, Any] = {"trace": update.trace, "logprobs": logprobs} if last else {}
            events.append(self._chunk(update.index, delta, **extra))
        if done:
            events.append(
                self._chunk(update.index, {}, reason=_reason(update.finish_reason, parsed), stop_reason=update.stop_reason)
            )
        return events

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        stop_reason: str | int | None = None,
        trace: dict[str, Any] | None = None,
        logprobs: list[dict[str, Any]] | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": reason,
        }
        if reason is not None:
            choice["stop_reason"] = stop_reason
        chunk = self._object("chat.completion.chunk", [choice])
        if (options := self.body.stream_options) is not None:
            if options.continuous_usage_stats:
                chunk["usage"] = self.answers.usage()
            elif options.include_usage:
                chunk["usage"] = None
        if trace is not None:
            chunk["medusa"] = trace
        return event(chunk)

    def _logprobs(self, update: Update) -> list[dict[str, Any]]:
        return [entry(each, self.service.texts) for each in update.logprobs or ()]


def entry(found: TokenLogprobs, texts: TokenTexts) -> dict[str, Any]:
    """A token's log-probabilities as chat completions have them."""
    top = [_token(token, logprob, texts) for token, logprob in found.top]
    return {**_token(found.token, found.logprob, texts), "top_logprobs": top}


def _token(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": max(logprob, -9999.0), "bytes": list(texts.bytes(token))}


def _call(call: Called) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _reason(reason: str | None, parsed: Parsed) -> str | None:
    return "tool_calls" if parsed.calls and reason == "stop" else reason
