"""Self-distillation: the model answers seed prompts, and what it says becomes its training data (paper 2.3.2)."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from medusa.endpoint import Endpoint, EndpointError, EndpointRefused
from medusa.errors import InvalidInput
from medusa.model import MedusaModel
from medusa.records import append_line, claim, hold, read_lines
from medusa.samples import Message, Skips, read_samples
from medusa.training.templates import end_of_turn, ends_users_turns, opening

SHARD = "samples-{:05d}.jsonl"
MADE_BY = "distillation.yaml"
DOES_NOT_FIT = "whose prompt is empty or does not fit the context"
SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True)
class Seed:
    """What a sample begins with: the user's turns of a conversation, perhaps after a system turn, or plain text."""

    id: str
    turns: tuple[Message, ...] = ()
    text: str = ""
    whole: bool = False  # the text is a prompt, of which nothing may be cut


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


class Answerer(Protocol):
    """Turns seeds into records, as many at a time as it likes: (seed, record) or (seed, why it failed), and tokens made."""

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]: ...


def read_seeds(source: str | Path, skips: Skips) -> list[Seed]:
    """The seeds of a data set in any of our formats; the assistant's turns in it are dropped.

    A seed's id is a hash of what it asks, so that a file may be reordered or added to between runs.
    """
    seeds, seen = [], Counter[str]()
    for sample in read_samples(source, skips):
        turns = tuple(message for message in sample.messages or () if message["role"] != "assistant")
        text = "" if sample.messages is not None else sample.prompt or sample.text or ""
        if not text and not any(message["role"] == "user" for message in turns):
            skips.add("with nothing to answer", sample.source)
            continue
        digest = hashlib.sha256(json.dumps([turns, text]).encode()).hexdigest()[:16]
        seeds.append(Seed(f"{digest}-{seen[digest]}", turns, text, whole=sample.prompt is not None))
        seen[digest] += 1
    return seeds


class Shards:
    """A folder of JSONL shards that a run adds to, alone: every sample whole and on the disk, or not there at all.

    Args:
        made_by: what makes the samples, noted in the folder; a folder of another maker is refused.
    """

    def __init__(self, folder: str | Path, made_by: dict[str, Any] | None = None, per_shard: int = SAMPLES_PER_SHARD):
        self.folder, self._per_shard = Path(folder), per_shard
        self._held = hold(self.folder / "samples")
        if made_by is not None:
            claim(self.folder / MADE_BY, made_by)
        paths = sorted(self.folder.glob("samples-*.jsonl"))
        found = [set(read_lines(path, "sample of a distillation")) for path in paths]
        self.done = set().union(*found)
        self._number = max(0, len(paths) - 1)
        self._in_shard = len(found[-1]) if found else 0

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
    with tqdm(total=len(seeds), initial=already, desc="Distilling", unit=" samples") as bar:
        for seed, outcome, new in answerer(left):
            tokens += new
            if isinstance(outcome, str):
                failed[outcome] += 1
            else:
                shards.add(seed.id, outcome)
                made += 1
                bar.update()
            bar.set_postfix(tokens_per_second=f"{tokens / (time.perf_counter() - start):.0f}", failed=failed.total())
    return Distilled(made, already, failed, tokens, time.perf_counter() - start)


class ModelAnswerer:
    """Answers with our own engine, a batch of conversations at a time, with Medusa heads where the model has some."""

    def __init__(self, model: MedusaModel, tokenizer: Any, options: Distillation):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._ends = set(model.eos_token_ids)
        if tokenizer.chat_template:
            self._ends |= set(end_of_turn(tokenizer))
            if options.self_talk and not ends_users_turns(tokenizer):
                raise InvalidInput("--self-talk needs a chat template that ends the user's turns with a special token")

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]:
        seeds = sorted(seeds, key=lambda seed: len(seed.turns))  # conversations of as many turns end together
        for start in range(0, len(seeds), self.options.batch_size):
            batch = seeds[start : start + self.options.batch_size]
            spoken = [seed for seed in batch if seed.turns]
            if spoken:
                yield from self._converse(spoken)
            if plain := [seed for seed in batch if not seed.turns]:
                yield from self._continue(plain)

    def _continue(self, seeds: list[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]:
        """Plain text and the model's continuation of it, as token ids: decoded and encoded again they might differ."""
        prompts = [self.tokenizer(seed.text, verbose=False)["input_ids"] for seed in seeds]
        prompts = [p if seed.whole else p[: self.options.prompt_tokens] for seed, p in zip(seeds, prompts, strict=True)]
        for seed, prompt, answer in zip(seeds, prompts, self._generate(prompts), strict=True):
            if isinstance(answer, str):
                yield seed, answer, 0
            else:
                yield seed, {"input_ids": prompt + answer, "prompt_tokens": len(prompt)}, len(answer)

    def _converse(self, seeds: list[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]:
        talks = [_Talk(seed, self.options.self_talk) for seed in seeds]
        while active := [(talk, speaker) for talk in talks if (speaker := talk.next_speaker())]:
            asked = [(talk, prompt) for talk, speaker in active if (prompt := self._prompt(talk, speaker)) is not None]
            for (talk, _), answer in zip(asked, self._generate([prompt for _, prompt in asked]), strict=True):
                talk.hear(answer if isinstance(answer, str) else None, *self._said(answer))
        for talk in talks:
            yield talk.seed, talk.outcome(), talk.tokens

    def _prompt(self, talk: _Talk, speaker: str) -> list[int] | None:
        """The ids up to where the speaker begins; none where the template refuses the conversation."""
        try:
            text = opening(self.tokenizer, talk.messages, speaker)
        except InvalidInput as error:
            talk.hear(str(error), "", 0, False)
            return None
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _said(self, answer: list[int] | str) -> tuple[str, int, bool]:
        """Text, tokens, and whether the turn ended by itself."""
        if isinstance(answer, str):
            return "", 0, False
        ended = bool(answer) and answer[-1] in self._ends
        text = self.tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True)
        return text.strip(), len(answer), ended

    def _generate(self, prompts: list[list[int]]) -> list[list[int] | str]:
        """New tokens for each prompt, or why there are none."""
        options = self.options
        room = (self.model.context or 1 << 30) - options.max_new_tokens - len(self.model.tree)
        short = [n for n, prompt in enumerate(prompts) if 0 < len(prompt) <= room]
        results: list[list[int] | str] = [DOES_NOT_FIT] * len(prompts)
        if not short:
            return results
        width = max(len(prompts[n]) for n in short)
        ids, mask = torch.zeros(len(short), width, dtype=torch.long), torch.zeros(len(short), width, dtype=torch.long)
        for row, n in enumerate(short):
            ids[row, width - len(prompts[n]) :] = torch.tensor(prompts[n])
            mask[row, width - len(prompts[n]) :] = 1
        sampling: dict[str, Any] = {}
        if options.temperature > 0:
            # Each batch from a seed of its own, the same whenever the same prompts come together.
            digest = hashlib.sha256(json.dumps([options.seed, prompts]).encode()).digest()
            sampling = {"do_sample": True, "temperature": options.temperature, "seed": int.from_bytes(digest[:6], "big")}
            if options.top_p is not None:
                sampling["top_p"] = options.top_p
        output: Any = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=sorted(self._ends) or None,
            compile=options.compile,
            return_dict_in_generate=True,
            **sampling,
        )
        for row, n in enumerate(short):
            results[n] = output.sequences[row, width : width + sum(output.acceptance_lengths[row])].tolist()
        return results


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
                talk.hear(str(error), "", 0, False)
                continue
            if answer.finished is None:
                talk.hear(f"whose answer ended by {answer.ended_by!r}, neither by itself nor at the limit", "", 0, False)
            else:
                talk.hear(None, answer.text.strip(), answer.completion_tokens, answer.finished)
        return seed, talk.outcome(), talk.tokens


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

    def hear(self, failure: str | None, text: str, tokens: int, ended: bool) -> None:
        """Take in the turn that `next_speaker` asked for. A turn cut at the limit of tokens is the last."""
        speaker = self.next_speaker()
        self.tokens += tokens
        if failure is None and not text and speaker == "assistant":
            failure = "to which the model said nothing"
        if failure == DOES_NOT_FIT and any(message["role"] == "assistant" for message in self.messages):
            self._over = True  # it outgrew the context: its whole rounds are good
            return
        if failure is not None:
            self._failure = failure
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

    def outcome(self) -> dict[str, Any] | str:
        """The record, or why there is none: of a conversation that failed nothing is kept."""
        if self._failure is not None:
            return self._failure
        messages = self.messages if self.messages[-1]["role"] == "assistant" else self.messages[:-1]
        return {"messages": messages, "cut": True} if self._cut else {"messages": messages}
