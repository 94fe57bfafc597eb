"""Questions without data: the model writes user turns after the header of its own chat template (Magpie, 2406.08464)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medusa.batch.pool import Request, decode_queue
from medusa.data.prompts import opening_ids
from medusa.data.templates import ends_of_turns, ends_users_turns
from medusa.errors import InvalidInput
from medusa.generation.preparation import options_of_rows
from medusa.model import MedusaModel
from medusa.runs.console import progress
from medusa.runs.records import Journal
from medusa.trees.static import MedusaTree

QUESTIONS = Path("self") / "questions.jsonl"  # inside the folder of the samples
LONGEST = 256  # maximum number of tokens in a question
LEAST_WORDS, MOST_CHARACTERS = 3, 1500
LEAST_LETTERS = 0.7  # minimum share of letters, digits and spaces
LEAST_DISTINCT = 0.4  # minimum share of distinct words, in questions of at least two shingles
SHINGLE = 5  # number of words in a shingle, a run of words
MOST_SEEN = 0.4  # maximum share of a question's shingles that earlier questions have
TEMPERATURE, MIN_P = 1.0, 0.05
MOST_TRIES = 4  # maximum number of questions written for each one needed


class Filter:
    """Keeps questions worth answering: complete, of a sensible length, in words, and unlike those kept before."""

    def __init__(self) -> None:
        self.refused = Counter[str]()
        self._seen: set[tuple[str, ...]] = set()

    def takes(self, text: str) -> bool:
        """Whether a question is kept; rejected ones are counted by reason."""
        words = re.findall(r"\w+", text.lower())
        if len(words) < LEAST_WORDS or len(text) > MOST_CHARACTERS:
            return self._refuse("too short or too long")
        letters = sum(character.isalnum() or character.isspace() for character in text)
        if letters < LEAST_LETTERS * len(text) or "\ufffd" in text:
            return self._refuse("not in words")
        if len(words) >= 2 * SHINGLE and len(set(words)) < LEAST_DISTINCT * len(words):
            return self._refuse("repeating itself")
        size = min(SHINGLE, len(words))
        shingles = {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
        if len(shingles & self._seen) > MOST_SEEN * len(shingles):
            return self._refuse("much like another")
        self._seen |= shingles
        return True

    def _refuse(self, reason: str) -> bool:
        self.refused[reason] += 1
        return False


def check_template(tokenizer: Any) -> None:
    """InvalidInput if a model cannot write a user's turns, for lack of a chat template that ends them with a special token."""
    if not tokenizer.chat_template or not ends_users_turns(tokenizer):
        raise InvalidInput("--data self needs a chat template that ends the user's turns with a special token")


def write_questions(
    model: MedusaModel, tokenizer: Any, folder: Path, count: int, rows: int, seed: int = 0, compiled: bool = False
) -> Path:
    """Have the model write the first turns of `count` conversations, `rows` at a time; return their file in the folder of the
    samples. InvalidInput if its chat template does not end the user's turns with a special token, or too few pass the filter.

    If interrupted, the same call resumes: question n depends only on n and the seed, and the filter only on their order.
    """
    check_template(tokenizer)
    prompt = opening_ids(tokenizer, [], "user")
    journal, keeps = Journal(folder / QUESTIONS, "question of a model"), Filter()
    asked = 0
    for record in journal.records.values():
        asked = max(asked, record["number"] + 1)
        keeps.takes(record["messages"][0]["content"])
    if len(journal.records) >= count:
        return journal.path

    numbers = iter(range(asked, asked + MOST_TRIES * count))
    with progress("Writing questions", count, "questions", len(journal.records)) as bar:
        for number, text in _in_order(_written(model, tokenizer, prompt, numbers, rows, seed, compiled), asked):
            if text is None:
                keeps.refused["unfinished"] += 1
            elif keeps.takes(text):
                journal.add({"id": str(number), "number": number, "messages": [{"role": "user", "content": text}]})
                bar.update()
            bar.set_postfix(refused=keeps.refused.total(), refresh=False)
            if len(journal.records) >= count:
                return journal.path
    reasons = "; ".join(f"{number} {reason}" for reason, number in keeps.refused.most_common())
    raise InvalidInput(f"of {MOST_TRIES * count} questions {len(journal.records)} were kept, expected {count}: {reasons}")


def _written(
    model: MedusaModel, tokenizer: Any, prompt: list[int], numbers: Iterator[int], rows: int, seed: int, compiled: bool
) -> Iterator[tuple[int, str | None]]:
    """Questions with their numbers, in the order in which they finish; None for one that did not end."""
    ends = list(ends_of_turns(tokenizer, model.eos_token_ids))
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "min_p": MIN_P}
    options = options_of_rows(model, "distill", max_new_tokens=LONGEST, eos_token_id=ends, **sampling)

    def take() -> Request | None:
        number = next(numbers, None)
        return None if number is None else Request(prompt, seed * 1_000_003 + number, number)

    for finished in decode_queue(model.compiled if compiled else model, take, rows, MedusaTree([]), options):
        ended = finished.finish_reason == "eos"
        text = tokenizer.decode(finished.tokens[:-1], skip_special_tokens=True).strip() if ended else None
        yield finished.request.tag, text


def _in_order(found: Iterator[tuple[int, str | None]], first: int) -> Iterator[tuple[int, str | None]]:
    """The questions in the order of their numbers, so that the filter does not depend on which is finished first."""
    waiting: dict[int, str | None] = {}
    for number, text in found:
        waiting[number] = text
        while first in waiting:
            yield first, waiting.pop(first)
            first += 1
