"""Completions: the objects and the chunks of POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from medusa.serving.answers import Answers, Update
from medusa.serving.calls import Call, Service, make_call
from medusa.serving.pieces import TokenTexts
from medusa.serving.problems import Problem
from medusa.serving.prompts import text_ids
from medusa.serving.requests import TokenLogprobs
from medusa.serving.schemas import CompletionRequest
from medusa.serving.streams import event
from medusa.text import Detokenizer


def prepare_completion(service: Service, body: CompletionRequest) -> list[Call]:
    """The calls of a body, one for each prompt. Takes milliseconds to seconds: not for the event loop."""
    given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(given[0], int):
        given = [given]
    if len(given) * (body.n or 1) > service.settings.max_answers:
        raise Problem(f"prompt: {len(given)} prompts with n={body.n or 1} are more than {service.settings.max_answers} answers")
    grammar, calls = service.grammars.of(body), []
    for prompt in given:
        ids = text_ids(service.tokenizer, prompt, body.add_special_tokens) if isinstance(prompt, str) else list(prompt)
        calls.append(make_call(service, body, ids, grammar))
    return calls


@dataclass
class CompletionAnswer:
    """The answer to a completion, whole or in chunks."""

    service: Service
    body: CompletionRequest
    answers: Answers
    request_id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._steps: list[dict[str, Any]] = []
        self._begun = [False] * len(self.answers.answers)
        self._lengths = [0] * len(self.answers.answers)  # characters sent, of which the offsets of tokens count

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.request_id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.service.name,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }

    async def whole(self) -> dict[str, Any]:
        """The text_completion object."""
        choices = [_choice(index) for index in range(len(self._begun))]
        for choice in choices:
            choice["logprobs"] = None if self.body.logprobs is None else _no_logprobs()
        async for update in self.answers.updates():
            choice = choices[update.index]
            text, logprobs = self._add(update)
            choice["text"] += text
            for key, values in (logprobs or {}).items():
                choice["logprobs"][key] += values
            if update.finish_reason is not None:
                choice |= {"finish_reason": update.finish_reason, "stop_reason": update.stop_reason}
            if update.trace is not None:
                self._steps.append({"index": update.index, **update.trace})
        answer = {**self._object(choices), "usage": self.answers.usage()}
        return {**answer, "medusa": {"steps": self._steps}} if self.body.medusa.trace != "none" else answer

    async def chunks(self) -> AsyncIterator[bytes]:
        """The text_completion events."""
        options = self.body.stream_options
        async for update in self.answers.updates():
            text, logprobs = self._add(update)
            if not (text or logprobs or update.finish_reason or update.trace):
                continue
            choice = _choice(update.index) | {"text": text, "logprobs": logprobs, "finish_reason": update.finish_reason}
            if update.finish_reason is not None:
                choice["stop_reason"] = update.stop_reason
            chunk = self._object([choice])
            if options is not None and options.continuous_usage_stats:
                chunk["usage"] = self.answers.usage()
            elif options is not None and options.include_usage:
                chunk["usage"] = None
            if update.trace is not None:
                chunk["medusa"] = update.trace
            yield event(chunk)
        if options is not None and options.include_usage:
            yield event({**self._object([]), "usage": self.answers.usage()})

    def _add(self, update: Update) -> tuple[str, dict[str, list[Any]] | None]:
        """The text and log-probabilities that a step adds; the first adds those of the prompt, if it is echoed."""
        answer, texts = self.answers.answers[update.index], self.service.texts
        text, found = update.text, _no_logprobs()
        begun, self._begun[update.index] = self._begun[update.index], True
        if answer.call.text is not None and not begun:
            text = answer.call.text + text
            if answer.prompt_logprobs is not None:
                _extend(
                    found, answer.prompt_logprobs, _offsets(self.service.tokenizer, answer.call.ids), answer.call.ids, texts
                )
            self._lengths[update.index] = len(answer.call.text)
        offsets = [self._lengths[update.index] + piece.start for piece in update.pieces]
        _extend(found, update.logprobs or [], offsets, [piece.token for piece in update.pieces], texts)
        return text, found if self.body.logprobs is not None and found["tokens"] else None


def _choice(index: int) -> dict[str, Any]:
    return {"index": index, "text": "", "logprobs": None, "finish_reason": None}


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _extend(
    found: dict[str, list[Any]],
    logprobs: Iterable[TokenLogprobs | None],
    offsets: list[int],
    tokens: list[int],
    texts: TokenTexts,
) -> None:
    for each, offset, token in zip(logprobs, offsets, tokens, strict=False):
        found["tokens"].append(texts.name(token))
        found["token_logprobs"].append(None if each is None else max(each.logprob, -9999.0))
        found["top_logprobs"].append(None if each is None else _top(each, texts))
        found["text_offset"].append(offset)


def _top(found: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    """The likeliest tokens by name, the chosen one among them."""
    pairs = [*found.top, (found.token, found.logprob)]
    return {texts.name(token): max(logprob, -9999.0) for token, logprob in pairs}


def _offsets(tokenizer: Any, ids: list[int]) -> list[int]:
    """Where each token of a prompt begins in its text."""
    detokenizer, offsets, length = Detokenizer(tokenizer, skip_special_tokens=False), [], 0
    for token in ids:
        offsets.append(length)
        length += len(detokenizer.put([token]))
    return offsets
