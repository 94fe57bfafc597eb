"""Answerers: our own engine, or a model behind an endpoint, answers the prompts of a distillation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from medusa.batch.pool import Request, decode_queue
from medusa.data.endpoint import Endpoint, EndpointError, EndpointRefused
from medusa.data.prompts import opening_ids
from medusa.data.samples import Message
from medusa.data.templates import ends_of_turns, ends_users_turns
from medusa.errors import InvalidInput
from medusa.generation.preparation import options_of_rows
from medusa.model import MedusaModel
from medusa.runs.files import digest
from medusa.training.distillation import Distillation, Seed

DOES_NOT_FIT = "whose prompt is empty or does not fit the context"


class ModelAnswerer:
    """Answers with our own engine, with Medusa heads if the model has some.

    A row whose answer ends gets the next prompt at once. An answer depends on the options and on its own seed, not on the other
    rows of the batch.
    """

    def __init__(self, model: MedusaModel, tokenizer: Any, options: Distillation):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._ends = ends_of_turns(tokenizer, model.eos_token_ids)
        if tokenizer.chat_template and options.self_talk and not ends_users_turns(tokenizer):
            raise InvalidInput("--self-talk needs a chat template that ends the user's turns with a special token")

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]:
        fresh = (_Conversation(seed, self.options.self_talk) if self._is_chat(seed) else _Continuation(seed) for seed in seeds)
        unfinished: deque[_Conversation | _Continuation] = deque()  # jobs with a turn written and another to write
        finished: list[_Conversation | _Continuation] = []

        def take() -> Request | None:
            while job := unfinished.popleft() if unfinished else next(fresh, None):
                if (prompt := self._prompt(job)) is not None:
                    return Request(prompt, self._seed(job), job)
                finished.append(job)
            return None

        for job, answer in self._answers(take):
            text, ended = self._text(answer) if isinstance(job, _Conversation) else ("", False)
            job.add_answer(answer, text, ended)
            (finished if job.next_speaker() is None else unfinished).append(job)
            yield from ((job.seed, job.outcome(), job.tokens) for job in finished)
            finished.clear()
        yield from ((job.seed, job.outcome(), job.tokens) for job in finished)

    def _is_chat(self, seed: Seed) -> bool:
        """Whether this model answers a seed as a conversation, rather than continuing it as text."""
        return bool(seed.turns) and (bool(self.tokenizer.chat_template) or not seed.text)

    def _answers(self, take: Callable[[], Request | None]) -> Iterator[tuple[Any, list[int]]]:
        """Each request's job with its new tokens."""
        model, options = self.model, self.options
        sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature > 0 else {}
        limits = {"max_new_tokens": options.max_new_tokens, "eos_token_id": list(self._ends)}
        decoding = options_of_rows(model, "distill", do_sample=bool(sampling), **limits, **sampling)
        decodable = model.compiled if options.compile else model
        for finished in decode_queue(decodable, take, options.batch_size, model.tree, decoding):
            yield finished.request.tag, finished.tokens

    def _prompt(self, job: _Conversation | _Continuation) -> list[int] | None:
        """Token ids up to where the model continues; None if they do not fit or the template refuses the conversation."""
        if isinstance(job, _Continuation):
            # The record keeps these ids: text decoded and encoded again might differ.
            job.ids = list(job.seed.ids or self.tokenizer(job.seed.text, verbose=False)["input_ids"])
            if not job.seed.whole and not job.seed.ids:
                job.ids = job.ids[: self.options.prompt_tokens]
            ids = job.ids
        else:
            try:
                ids = opening_ids(self.tokenizer, job.messages, job.next_speaker() or "")
            except InvalidInput as error:
                job.fail(str(error))
                return None
        room = (self.model.max_length or 1 << 30) - self.options.max_new_tokens - len(self.model.tree)
        if not 0 < len(ids) <= room:
            job.fail(DOES_NOT_FIT)
            return None
        return ids

    def _text(self, answer: list[int]) -> tuple[str, bool]:
        """The answer's text, and whether the model ended its turn."""
        ended = bool(answer) and answer[-1] in self._ends
        return self.tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True).strip(), ended

    def _seed(self, job: _Conversation | _Continuation) -> int:
        """The random seed of a turn, the same in every run."""
        return int(digest([self.options.seed, job.seed.id, job.number_of_turns])[:12], 16)


class EndpointAnswerer:
    """Answers through an OpenAI-compatible endpoint, with a bounded number of requests at a time."""

    def __init__(self, endpoint: Endpoint, options: Distillation):
        if options.self_talk:
            raise InvalidInput("a chat endpoint cannot write the user's turns; drop --self-talk")
        self.endpoint, self.options = endpoint, options

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]:
        yield from self.endpoint.concurrently(self._answer, seeds, self.options.batch_size)

    def _answer(self, seed: Seed) -> tuple[Seed, dict[str, Any] | str, int]:
        if not seed.turns:
            return seed, "of plain text, which a chat endpoint cannot continue", 0
        conversation = _Conversation(seed, 0)
        options = self.options
        request: dict[str, Any] = {"max_tokens": options.max_new_tokens, "temperature": options.temperature}
        if options.top_p is not None:
            request["top_p"] = options.top_p
        while conversation.next_speaker():
            try:
                answer = self.endpoint.chat(conversation.messages, **request)
            except EndpointRefused:
                raise  # the next request would be refused as well
            except EndpointError as error:
                conversation.fail(str(error))
                continue
            if answer.finished is None:
                conversation.fail(f"whose answer ended by {answer.ended_by!r}, neither by itself nor at the limit of tokens")
            else:
                conversation.add(answer.text.strip(), answer.completion_tokens, answer.finished)
        return seed, conversation.outcome(), conversation.tokens


class _Continuation:
    """A plain text and its continuation."""

    number_of_turns = 0

    def __init__(self, seed: Seed):
        self.seed, self.tokens = seed, 0
        self.ids: list[int] = []
        self._answer: list[int] | None = None
        self._failure = ""

    def next_speaker(self) -> None:
        return None  # a text is continued once

    def add_answer(self, answer: list[int], text: str, ended: bool) -> None:
        self._answer, self.tokens = answer, len(answer)

    def fail(self, reason: str) -> None:
        self._failure = reason

    def outcome(self) -> dict[str, Any] | str:
        """The record, or the reason why there is none."""
        if self._answer is None:
            return self._failure
        return {"input_ids": self.ids + self._answer, "prompt_tokens": len(self.ids)}


class _Conversation:
    """A conversation as it grows: with the seed's user turns in order, or after the first with user turns by the model."""

    def __init__(self, seed: Seed, self_talk: int):
        self.seed, self.tokens = seed, 0
        self._rest = list(seed.turns)
        self._rounds_left = self_talk
        self._failure: str | None = None
        self._over = self._cut = False
        self.messages: list[Message] = []
        self._add_turns_of_seed()
        if self_talk:
            self._rest = []

    def _add_turns_of_seed(self) -> None:
        while self._rest and (not self.messages or self.messages[-1]["role"] != "user"):
            self.messages.append(self._rest.pop(0))

    def next_speaker(self) -> str | None:
        """Whose turn the model writes next; None at the end."""
        if self._over or self._failure is not None:
            return None
        if self.messages[-1]["role"] == "user":
            return "assistant"
        return "user" if self._rounds_left else None

    @property
    def number_of_turns(self) -> int:
        return len(self.messages)

    def fail(self, reason: str) -> None:
        """Note that the turn of `next_speaker` cannot be written."""
        if reason == DOES_NOT_FIT and any(message["role"] == "assistant" for message in self.messages):
            self._over = True  # it outgrew the context; complete rounds are kept
        else:
            self._failure = reason

    def add(self, text: str, tokens: int, ended: bool) -> None:
        """Append the turn of `next_speaker`. A turn cut at the limit of tokens is the last."""
        speaker = self.next_speaker()
        self.tokens += tokens
        if not text and speaker == "assistant":
            self._failure = "to which the model gave no answer"
            return
        if speaker == "user":
            self._rounds_left -= 1
            if not text or not ended:
                self._over = True
                return
        self.messages.append({"role": speaker or "", "content": text})
        if speaker == "assistant":
            if not ended:
                self._over = self._cut = True
            else:
                self._add_turns_of_seed()

    def add_answer(self, answer: list[int], text: str, ended: bool) -> None:
        self.add(text, len(answer), ended)

    def outcome(self) -> dict[str, Any] | str:
        """The record, or the reason why there is none; failed conversations are not kept."""
        if self._failure is not None:
            return self._failure
        messages = self.messages if self.messages[-1]["role"] == "assistant" else self.messages[:-1]
        return {"messages": messages, "cut": True} if self._cut else {"messages": messages}
