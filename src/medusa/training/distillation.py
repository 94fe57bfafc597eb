"""Self-distillation: the model answers seed prompts, and its answers become its training data (paper 2.3.2)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from medusa.config import check_options, option
from medusa.data.samples import Message, Skips, read_prompts
from medusa.errors import InvalidInput
from medusa.runs.console import progress
from medusa.runs.files import digest
from medusa.runs.records import append_line, claim, hold, read_lines, refuse_claimed

SHARD = "samples-{:05d}.jsonl"
MADE_BY = "distillation.yaml"
SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True)
class Seed:
    """The beginning of a sample: a conversation's user turns, possibly after a system turn; plain text; or token ids.

    A bare prompt is both a turn and a text: a model with a chat template answers it, any other model continues it.
    """

    id: str
    turns: tuple[Message, ...] = ()
    text: str = ""
    whole: bool = False  # the text is a prompt, not the beginning of a document: nothing may be cut off
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Distillation:
    """How the model answers."""

    temperature: float = option(0.3, "Temperature of the sampling; 0 is greedy.", least=0)  # the paper's for Vicuna-33B
    top_p: float | None = option(None, "Sample from the smallest set of most likely tokens with this total probability.")
    max_new_tokens: int = option(512, "Maximum number of tokens per answer.", least=1)
    prompt_tokens: int = option(128, "Number of tokens of a plain text to keep, for the model to continue.", least=1)
    self_talk: int = option(0, "Number of further rounds in which the model writes the user's turns too.", least=0)
    batch_size: int = option(16, "Number of conversations decoded, or requests sent, at a time.", least=1)
    compile: bool = option(False, "One graph per step: compiled on a CPU (slow first step), recorded on a GPU.")
    seed: int = option(0, "Seed of the sampling.", least=0)

    def __post_init__(self):
        check_options(self)
        if self.top_p is not None and not self.temperature:
            raise InvalidInput(f"top_p is {self.top_p}, which does nothing at temperature 0; raise the temperature")

    @property
    def lasting(self) -> dict[str, Any]:
        """The options that change the answers."""
        return {name: value for name, value in vars(self).items() if name not in ("batch_size", "compile")}


class Answerer(Protocol):
    """Turns seeds into records, in any order: yields the seed, its record or the reason of its failure, and its tokens."""

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]: ...


def read_seeds(source: str | Path, skips: Skips) -> list[Seed]:
    """The seeds of a set of prompts (`read_prompts`).

    A prompt with a completion and a document (`{"text"}`) are plain text to every model. A seed's id is a hash of its contents,
    so that a file may be reordered or extended between runs.
    """
    seeds, seen = [], Counter[str]()
    for asked in read_prompts(source, skips):
        system = ({"role": "system", "content": asked.system},) if asked.system else ()
        turns = (*system, *({"role": "user", "content": text} for text in asked.turns))
        text = asked.text
        if text and (not asked.whole or isinstance(asked.record.get("completion"), str)):
            turns = ()
        contents = digest([turns, text, asked.ids] if asked.ids else [turns, text])
        seeds.append(Seed(f"{contents}-{seen[contents]}", turns, text, asked.whole and bool(text), asked.ids))
        seen[contents] += 1
    return seeds


class Shards:
    """A folder of JSONL shards that one process appends to; each sample is durable or absent.

    Args:
        made_by: model and options, noted in the folder; a folder made with others is refused.
        per_shard: number of samples in a shard.
    """

    def __init__(self, folder: str | Path, made_by: dict[str, Any] | None = None, per_shard: int = SAMPLES_PER_SHARD):
        self.folder, self._per_shard = Path(folder), per_shard
        self._held = hold(self.folder / "samples")
        if made_by is not None:
            if not any(self.folder.rglob("*.jsonl")):  # an earlier run made no samples
                (self.folder / MADE_BY).unlink(missing_ok=True)
            claim(self.folder / MADE_BY, made_by)
        paths = sorted(self.folder.glob("samples-*.jsonl"))
        found = [set(read_lines(path, "sample of a distillation")) for path in paths]
        self.done = set().union(*found)
        self._number = max(0, len(paths) - 1)
        self._in_shard = len(found[-1]) if found else 0

    @staticmethod
    def refuse_other(folder: Path, made_by: dict[str, Any]) -> None:
        """Refuse a folder of samples made with another model or options, which are named, before anything is loaded or
        written."""
        if any(folder.rglob("*.jsonl")):
            refuse_claimed(folder / MADE_BY, made_by)

    def add(self, identifier: str, record: dict[str, Any]) -> None:
        """Write a sample; it is on the disk when this returns. InvalidInput if it cannot be written; earlier ones are kept."""
        if identifier in self.done:
            return
        if self._in_shard >= self._per_shard:
            self._number, self._in_shard = self._number + 1, 0
        append_line(self.folder / SHARD.format(self._number), {"id": identifier, **record})
        self.done.add(identifier)
        self._in_shard += 1


@dataclass(frozen=True)
class Distilled:
    """The result of a distillation."""

    output: Path  # the folder of samples
    made: int  # number of samples made now
    already: int  # number of samples that earlier runs had made
    failed: Counter[str]  # number of samples that failed, by reason
    tokens: int  # number of tokens made now
    seconds: float  # time that they took
    skips: Skips = field(default_factory=Skips)  # records of the prompts that were left out

    def to_dict(self) -> dict[str, Any]:
        """As `medusa distill --json` prints it."""
        record = {"output": str(self.output), "made": self.made, "already": self.already, "failed": dict(self.failed)}
        return record | {"skipped": dict(self.skips.reasons), "tokens": self.tokens, "seconds": self.seconds}


def answer_seeds(seeds: Sequence[Seed], answerer: Answerer, shards: Shards, skips: Skips | None = None) -> Distilled:
    """Answer every seed that has no sample yet. If interrupted, the same call resumes."""
    left = [seed for seed in seeds if seed.id not in shards.done]
    already, made, tokens, failed = len(seeds) - len(left), 0, 0, Counter[str]()
    start = time.perf_counter()
    with progress("Distilling", len(seeds), "samples", already) as bar:
        for seed, outcome, new in answerer(left):
            tokens += new
            if isinstance(outcome, str):
                failed[outcome] += 1
            else:
                shards.add(seed.id, outcome)
                made += 1
                bar.update()
            rate = f"{tokens / (time.perf_counter() - start):.0f} tokens/s"
            bar.set_postfix_str(f"{rate}, {failed.total()} failed" if failed else rate)
    return Distilled(shards.folder, made, already, failed, tokens, time.perf_counter() - start, skips or Skips())
