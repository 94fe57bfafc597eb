"""Chat completions: the objects and the chunks of POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from medusa.serving.answers import Update
from medusa.serving.calls import Call, Service, make_call
from medusa.serving.objects import Completion
from medusa.serving.pieces import TokenTexts
from medusa.serving.problems import Problem
from medusa.serving.prompts import call_style, chat_ids
from medusa.serving.requests import TokenLogprobs
from medusa.serving.schemas import ChatRequest
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
        service.most_characters,
    )
    return [make_call(service, body, ids, service.grammars.of(body))]


@dataclass
class Said:
    """What has been sent of one answer."""

    text: str = ""
    content: int = 0
    calls: int = 0
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class ChatAnswer(Completion):
    """The answer to a chat completion."""

    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def __post_init__(self) -> None:
        self._reading: Reading = reading_of(self.body, call_style(self.service.tokenizer))
        self._said = [Said() for _ in self.answers.answers]

    def add(self, update: Update) -> None:
        self._said[update.index].text += update.text
        self._said[update.index].logprobs += self._logprobs(update)

    def choices(self) -> list[dict[str, Any]]:
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
                    "logprobs": {"content": said.logprobs, "refusal": None} if self.body.logprobs else None,
                    "finish_reason": _reason(answer.finish_reason, parsed),
                    "stop_reason": answer.stop_reason,
                }
            )
        return choices

    async def chunks(self) -> AsyncIterator[bytes]:
        for index in range(len(self._said)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for each in super().chunks():
            yield each

    def events(self, update: Update) -> list[bytes]:
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
        return self.chunk(choice, trace)

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
