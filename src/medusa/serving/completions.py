"""Completions: the objects and the chunks of POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from medusa.generation.text import Detokenizer
from medusa.serving.answers import Update
from medusa.serving.calls import Call, Service, make_call
from medusa.serving.objects import Completion
from medusa.serving.pieces import TokenTexts
from medusa.serving.problems import Problem
from medusa.serving.prompts import text_ids
from medusa.serving.requests import TokenLogprobs
from medusa.serving.schemas import CompletionRequest


def prepare_completion(service: Service, body: CompletionRequest) -> list[Call]:
    """The calls of a body, one for each prompt. Takes milliseconds to seconds: not for the event loop."""
    given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(given[0], int):
        given = [given]
    if len(given) * (body.n or 1) > service.settings.max_answers:
        raise Problem(f"prompt: {len(given)} prompts with n={body.n or 1} are more than {service.settings.max_answers} answers")
    grammar, calls = service.grammars.of(body), []
    for prompt in given:
        ids = [*prompt] if isinstance(prompt, list) else _ids(service, prompt, body)
        calls.append(make_call(service, body, ids, grammar))
    return calls


def _ids(service: Service, prompt: str, body: CompletionRequest) -> list[int]:
    return text_ids(service.tokenizer, prompt, body.add_special_tokens, service.most_characters)


@dataclass
class CompletionAnswer(Completion):
    """The answer to a completion."""

    prefix, kinds = "cmpl", ("text_completion", "text_completion")

    def __post_init__(self) -> None:
        self._choices = [_choice(index) for index in range(len(self.answers.answers))]
        for choice in self._choices:
            choice["logprobs"] = None if self.body.logprobs is None else _no_logprobs()
        self._begun = [False] * len(self._choices)
        self._lengths = [0] * len(self._choices)  # characters sent, of which the offsets of tokens count

    def add(self, update: Update) -> None:
        choice = self._choices[update.index]
        text, logprobs = self._added(update)
        choice["text"] += text
        for key, values in (logprobs or {}).items():
            choice["logprobs"][key] += values
        if update.finish_reason is not None:
            choice |= {"finish_reason": update.finish_reason, "stop_reason": update.stop_reason}

    def choices(self) -> list[dict[str, Any]]:
        return self._choices

    def events(self, update: Update) -> Iterable[bytes]:
        text, logprobs = self._added(update)
        if text or logprobs or update.finish_reason or update.trace:
            choice = _choice(update.index) | {"text": text, "logprobs": logprobs, "finish_reason": update.finish_reason}
            if update.finish_reason is not None:
                choice["stop_reason"] = update.stop_reason
            yield self.chunk(choice, update.trace)

    def _added(self, update: Update) -> tuple[str, dict[str, list[Any]] | None]:
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
