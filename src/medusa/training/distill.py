"""Self-distillation: the model answers seed prompts, and what it says becomes its training data (paper 2.3.2)."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from medusa.data.endpoint import Endpoint, EndpointError, EndpointRefused
from medusa.data.samples import Message, Skips, read_prompts
from medusa.data.templates import ends_of_turns, ends_users_turns, opening
from medusa.errors import InvalidInput
from medusa.model import MedusaModel
from medusa.pool import Request, decode_queue
from medusa.preparation import options_of_rows
from medusa.runs.records import append_line, claim, hold, read_lines, refuse_claimed

SHARD = "samples-{:05d}.jsonl"
MADE_BY = "distillation.yaml"
DOES_NOT_FIT = "whose prompt is empty or does not fit the context"
SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True)
class Seed:
    """What a sample begins with: the user's turns of a conversation, perhaps after a system turn; plain text; or token ids.

    A bare prompt is both a turn and a text: a model with a chat template is asked it, any other continues it.
    """

    id: str
    turns: tuple[Message, ...] = ()
    text: str = ""
    whole: bool = False  # the text is a prompt, of which nothing may be cut
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Distillation:
    """How the model answers."""

    temperature: float = 0.3  # the paper's for Vicuna-33B; 0 is greedy
    top_p: float | None = None
    max_new_tokens: int = 512  # of one answer
    prompt_tokens: int = 128  # of a plain text that the model continues
    self_talk: int = 0  # rounds that the model goes on by itself, writing the user's turns too; 0 replays the seed's
    batch_size: int = 16  # conversations at a time, or requests under way
    compile: bool = False  # the decoding steps
    seed: int = 0

    def __post_init__(self):
        for name in ("max_new_tokens", "prompt_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least 1")
        for name in ("temperature", "self_talk", "seed"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least 0")
        if self.top_p is not None and not self.temperature:
            raise InvalidInput(f"top_p is {self.top_p}, which does nothing at temperature 0; raise the temperature")


class Answerer(Protocol):
    """Turns seeds into records, as many at a time as it likes: (seed, record) or (seed, why it failed), and tokens made."""

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]: ...


def read_seeds(source: str | Path, skips: Skips) -> list[Seed]:
    """The seeds of a set of prompts (`read_prompts`).

    What has a completion beside it, and a document (`{"text"}`), is text to every model. A seed's id is a hash of what it asks,
    so that a file may be reordered or added to between runs.
    """
    seeds, seen = [], Counter[str]()
    for asked in read_prompts(source, skips):
        system = ({"role": "system", "content": asked.system},) if asked.system else ()
        turns = (*system, *({"role": "user", "content": text} for text in asked.turns))
        text = asked.text
        if text and (not asked.whole or isinstance(asked.record.get("completion"), str)):
            turns = ()
        digest = _digest(turns, text, asked.ids)
        seeds.append(Seed(f"{digest}-{seen[digest]}", turns, text, asked.whole and bool(text), asked.ids))
        seen[digest] += 1
    return seeds


def _digest(turns: tuple[Message, ...], text: str, ids: tuple[int, ...]) -> str:
    """A hash of what is asked."""
    asked = [turns, text, ids] if ids else [turns, text]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


class Shards:
    """A folder of JSONL shards that a run adds to, alone: every sample whole and on the disk, or not there at all.

    Args:
        made_by: what makes the samples, noted in the folder; a folder with samples of another maker is refused.
    """

    def __init__(self, folder: str | Path, made_by: dict[str, Any] | None = None, per_shard: int = SAMPLES_PER_SHARD):
        self.folder, self._per_shard = Path(folder), per_shard
        self._held = hold(self.folder / "samples")
        if made_by is not None:
            if not any(self.folder.rglob("*.jsonl")):  # a run that made nothing holds nothing
                (self.folder / MADE_BY).unlink(missing_ok=True)
            claim(self.folder / MADE_BY, made_by)
        paths = sorted(self.folder.glob("samples-*.jsonl"))
        found = [set(read_lines(path, "sample of a distillation")) for path in paths]
        self.done = set().union(*found)
        self._number = max(0, len(paths) - 1)
        self._in_shard = len(found[-1]) if found else 0

    @staticmethod
    def refuse_other(folder: Path, made_by: dict[str, Any]) -> None:
        """Refuse a folder with samples of another maker, before anything is loaded or written.

        Raises:
            InvalidInput: it has such; what differs is named.
        """
        if any(folder.rglob("*.jsonl")):
            refuse_claimed(folder / MADE_BY, made_by)

    def add(self, identifier: str, record: dict[str, Any]) -> None:
        """Write one sample; when this returns it is on the disk.

        Raises:
            InvalidInput: it cannot be written (the disk is full); what was written before is kept.
        """
        if identifier in self.done:
            return
        if self._in_shard >= self._per_shard:
            self._number, self._in_shard = self._number + 1, 0
        append_line(self.folder / SHARD.format(self._number), {"id": identifier, **record})
        self.done.add(identifier)
        self._in_shard += 1


@dataclass(frozen=True)
class Distilled:
    """What a run did."""

    made: int
    already: int
    failed: Counter[str]  # reason -> samples
    tokens: int
    seconds: float


def distill(seeds: Sequence[Seed], answerer: Answerer, shards: Shards) -> Distilled:
    """Answer every seed whose sample is not there yet. Killed at any moment, the same call goes on where it was."""
    left = [seed for seed in seeds if seed.id not in shards.done]
    already, made, tokens, failed = len(seeds) - len(left), 0, 0, Counter[str]()
    start = time.perf_counter()
    with tqdm(total=len(seeds), initial=already, desc="Distilling", unit=" samples", dynamic_ncols=True) as bar:
        for seed, outcome, new in answerer(left):
            tokens += new
            if isinstance(outcome, str):
                failed[outcome] += 1
            else:
                shards.add(seed.id, outcome)
                made += 1
                bar.update()
            told = f"{tokens / (time.perf_counter() - start):.0f} tokens/s"
            bar.set_postfix_str(f"{told}, {failed.total()} failed" if failed else told)
    return Distilled(made, already, failed, tokens, time.perf_counter() - start)


class ModelAnswerer:
    """Answers with our own engine, so many rows at a time, with Medusa heads where the model has some.

    A row whose answer ends is given the next prompt at once. An answer depends on the options and on the seed it answers, not
    on the rows beside it.
    """

    def __init__(self, model: MedusaModel, tokenizer: Any, options: Distillation):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._ends = ends_of_turns(tokenizer, model.eos_token_ids)
        if tokenizer.chat_template and options.self_talk and not ends_users_turns(tokenizer):
            raise InvalidInput("--self-talk needs a chat template that ends the user's turns with a special token")

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]:
        fresh = (_Talk(seed, self.options.self_talk) if self._asks(seed) else _Text(seed) for seed in seeds)
        going_on: deque[_Talk | _Text] = deque()  # with a turn said and another to say
        over: list[_Talk | _Text] = []

        def take() -> Request | None:
            while job := going_on.popleft() if going_on else next(fresh, None):
                if (prompt := self._prompt(job)) is not None:
                    return Request(prompt, self._seed(job), job)
                over.append(job)
            return None

        for job, answer in self._answers(take):
            text, ended = self._said(answer) if isinstance(job, _Talk) else ("", False)
            job.hear_answer(answer, text, ended)
            (over if job.next_speaker() is None else going_on).append(job)
            yield from ((job.seed, job.outcome(), job.tokens) for job in over)
            over.clear()
        yield from ((job.seed, job.outcome(), job.tokens) for job in over)

    def _asks(self, seed: Seed) -> bool:
        """Whether a seed is a conversation to this model, and no text to continue."""
        return bool(seed.turns) and (bool(self.tokenizer.chat_template) or not seed.text)

    def _answers(self, take: Callable[[], Request | None]) -> Iterator[tuple[Any, list[int]]]:
        """Whoever asked, and the new tokens."""
        model, options = self.model, self.options
        sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature > 0 else {}
        decoding = options_of_rows(
            model,
            "distill",
            max_new_tokens=options.max_new_tokens,
            do_sample=bool(sampling),
            eos_token_id=list(self._ends),
            **sampling,
        )
        decodable = model.compiled if options.compile else model
        for finished in decode_queue(decodable, take, options.batch_size, model.tree, decoding):
            yield finished.request.tag, finished.tokens

    def _prompt(self, job: _Talk | _Text) -> list[int] | None:
        """The ids up to where the model is to go on; none where they do not fit or the template refuses the conversation."""
        if isinstance(job, _Text):
            # Token ids: decoded and encoded again they might differ.
            job.ids = list(job.seed.ids or self.tokenizer(job.seed.text, verbose=False)["input_ids"])
            if not job.seed.whole and not job.seed.ids:
                job.ids = job.ids[: self.options.prompt_tokens]
            ids = job.ids
        else:
            try:
                text = opening(self.tokenizer, job.messages, job.next_speaker() or "")
            except InvalidInput as error:
                job.fail(str(error))
                return None
            ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        room = (self.model.context or 1 << 30) - self.options.max_new_tokens - len(self.model.tree)
        if not 0 < len(ids) <= room:
            job.fail(DOES_NOT_FIT)
            return None
        return ids

    def _said(self, answer: list[int]) -> tuple[str, bool]:
        """The text, and whether the turn ended by itself."""
        ended = bool(answer) and answer[-1] in self._ends
        return self.tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True).strip(), ended

    def _seed(self, job: _Talk | _Text) -> int:
        """Of a turn's draws: its own, and the same in every run."""
        digest = hashlib.sha256(json.dumps([self.options.seed, job.seed.id, job.turns_said]).encode()).digest()
        return int.from_bytes(digest[:6], "big")


class EndpointAnswerer:
    """Answers through an OpenAI-compatible endpoint, with a bounded number of requests under way."""

    def __init__(self, endpoint: Endpoint, options: Distillation):
        if options.self_talk:
            raise InvalidInput("a chat endpoint cannot write the user's turns; drop --self-talk")
        self.endpoint, self.options = endpoint, options

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]:
        yield from self.endpoint.concurrently(self._answer, seeds, self.options.batch_size)

    def _answer(self, seed: Seed) -> tuple[Seed, dict[str, Any] | str, int]:
        if not seed.turns:
            return seed, "of plain text, which a chat endpoint cannot continue", 0
        talk = _Talk(seed, 0)
        options = self.options
        request: dict[str, Any] = {"max_tokens": options.max_new_tokens, "temperature": options.temperature}
        if options.top_p is not None:
            request["top_p"] = options.top_p
        while talk.next_speaker():
            try:
                answer = self.endpoint.chat(talk.messages, **request)
            except EndpointRefused:
                raise  # the next would be refused as well
            except EndpointError as error:
                talk.fail(str(error))
                continue
            if answer.finished is None:
                talk.fail(f"whose answer ended by {answer.ended_by!r}, neither by itself nor at the limit of tokens")
            else:
                talk.hear(answer.text.strip(), answer.completion_tokens, answer.finished)
        return seed, talk.outcome(), talk.tokens


class _Text:
    """A plain text and its continuation."""

    turns_said = 0

    def __init__(self, seed: Seed):
        self.seed, self.tokens = seed, 0
        self.ids: list[int] = []
        self._answer: list[int] | None = None
        self._failure = ""

    def next_speaker(self) -> None:
        return None  # it is continued once

    def hear_answer(self, answer: list[int], text: str, ended: bool) -> None:
        self._answer, self.tokens = answer, len(answer)

    def fail(self, reason: str) -> None:
        self._failure = reason

    def outcome(self) -> dict[str, Any] | str:
        if self._answer is None:
            return self._failure
        return {"input_ids": self.ids + self._answer, "prompt_tokens": len(self.ids)}


class _Talk:
    """One conversation as it grows: the seed's user turns in order, or the model's own after the first."""

    def __init__(self, seed: Seed, self_talk: int):
        self.seed, self.tokens = seed, 0
        self._rest = list(seed.turns)
        self._rounds_left = self_talk
        self._failure: str | None = None
        self._over = self._cut = False
        self.messages: list[Message] = []
        self._take_seed_turns()
        if self_talk:
            self._rest = []

    def _take_seed_turns(self) -> None:
        while self._rest and (not self.messages or self.messages[-1]["role"] != "user"):
            self.messages.append(self._rest.pop(0))

    def next_speaker(self) -> str | None:
        """Whose turn the model is to write now, if any."""
        if self._over or self._failure is not None:
            return None
        if self.messages[-1]["role"] == "user":
            return "assistant"
        return "user" if self._rounds_left else None

    @property
    def turns_said(self) -> int:
        return len(self.messages)

    def fail(self, reason: str) -> None:
        """The turn that `next_speaker` asked for cannot be had."""
        if reason == DOES_NOT_FIT and any(message["role"] == "assistant" for message in self.messages):
            self._over = True  # it outgrew the context: its whole rounds are good
        else:
            self._failure = reason

    def hear(self, text: str, tokens: int, ended: bool) -> None:
        """Take in the turn that `next_speaker` asked for. A turn cut at the limit of tokens is the last."""
        speaker = self.next_speaker()
        self.tokens += tokens
        if not text and speaker == "assistant":
            self._failure = "to which the model said nothing"
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
                self._take_seed_turns()

    def hear_answer(self, answer: list[int], text: str, ended: bool) -> None:
        self.hear(text, len(answer), ended)

    def outcome(self) -> dict[str, Any] | str:
        """The record, or why there is none: of a conversation that failed nothing is kept."""
        if self._failure is not None:
            return self._failure
        messages = self.messages if self.messages[-1]["role"] == "assistant" else self.messages[:-1]
        return {"messages": messages, "cut": True} if self._cut else {"messages": messages}
