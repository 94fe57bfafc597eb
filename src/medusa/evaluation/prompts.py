"""Prompts that decoders are compared on: the published sets' files, a user's own, and the embedded model's held-out files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa import EMBEDDED
from medusa.errors import InvalidInput
from medusa.files import is_unicode, read_text
from medusa.samples import conversation, read_records

HELD_OUT = "held-out"
HELD_OUT_FILE = EMBEDDED / "held_out.jsonl"
HUB_SETS = {"mt-bench": "HuggingFaceH4/mt_bench_prompts", "humaneval": "openai/openai_humaneval:test"}
CODE = "code"  # the category of sets that are code alone
NO_CATEGORY, OVERALL = "all", "overall"
KINDS = "turns, instruction, messages, conversations, prompt, text or input_ids"


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt of the embedded model: 256 tokens of a file of the Python 3.11 standard library."""

    source: str
    split: str  # "test", or "calibration" for the tree search
    ids: Tensor  # (P,) long


def held_out_prompts(split: str = "test") -> list[Prompt]:
    """Held-out prompts that ship with the embedded model; neither its backbone nor its heads saw their files."""
    prompts = []
    for line in HELD_OUT_FILE.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["split"] == split:
            prompts.append(Prompt(record["source"], split, torch.tensor(record["input_ids"])))
    return prompts


@dataclass(frozen=True)
class Question:
    """What a decoder is asked, in one turn or several.

    Attributes:
        turns: the user's turns; each follows the decoder's own answer to the one before.
        references: a good answer to every turn, for a judge; none where there is none.
        ids: in place of turns: a prompt that is token ids already.
    """

    id: str
    category: str
    turns: tuple[str, ...] = ()
    system: str = ""
    references: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()


def read_questions(source: str | Path, references: str | Path | None = None) -> list[Question]:
    """The questions of a set, in its order.

    A record is MT-Bench's or Spec-Bench's (`turns`, `category`, perhaps `reference`), AlpacaEval's (`instruction`, its
    `dataset` being the category), HumanEval's (`task_id`, `prompt`), or any of those of `read_samples`, whose assistant's
    turns are left out. In a `.txt` file every line is a prompt.

    Args:
        source: `held-out`, `mt-bench`, `humaneval`, a file or folder, or a hub id.
        references: a file of reference answers by `question_id`, as MT-Bench has them.

    Raises:
        InvalidInput: no such set, a broken file, a record without a prompt or with an empty category, or two of one id.
    """
    if source == HELD_OUT:
        seen: Counter[str] = Counter()
        questions = []
        for prompt in held_out_prompts():
            seen[prompt.source] += 1
            identifier = f"{prompt.source}:{seen[prompt.source]}"
            questions.append(Question(identifier, CODE, ids=tuple(prompt.ids.tolist())))
    else:
        questions = [_question(where, n, record) for n, (where, record) in enumerate(_records(str(source)), 1)]
    if not questions:
        raise InvalidInput(f"{source} holds no prompts")
    twice = [identifier for identifier, times in Counter(q.id for q in questions).items() if times > 1]
    if twice:
        raise InvalidInput(f"{source} has {twice[0]!r} as the id of more than one question; ids must differ")
    return questions if references is None else _with_references(questions, references)


def select(questions: Sequence[Question], categories: Sequence[str] = (), limit: int | None = None) -> list[Question]:
    """The questions of some categories, and of these so many, spread evenly.

    Raises:
        InvalidInput: a category that no question is of, or a limit below 1.
    """
    known = dict.fromkeys(question.category for question in questions)
    for category in categories:
        if category not in known:
            raise InvalidInput(f"no question is of category {category!r}; there are {', '.join(known)}")
    chosen = [question for question in questions if not categories or question.category in categories]
    if limit is None or limit >= len(chosen):
        return chosen
    if limit < 1:
        raise InvalidInput(f"the limit of prompts is {limit}, wanted at least 1")
    return [chosen[n * len(chosen) // limit] for n in range(limit)]


def _records(source: str) -> Iterator[tuple[str, Any]]:
    if not source.endswith(".txt"):
        yield from read_records(HUB_SETS.get(source, source))
        return
    lines = read_text(source, InvalidInput).splitlines()
    yield from ((f"{source}:{n}", {"text": line}) for n, line in enumerate(lines, 1) if line.strip())


def _question(where: str, number: int, record: Any) -> Question:
    if not isinstance(record, dict):
        raise InvalidInput(f"{where} is a {type(record).__name__}, wanted an object with {KINDS}")
    given = next((record[key] for key in ("question_id", "task_id", "prompt_id", "id") if record.get(key) is not None), number)
    category = next((record[key] for key in ("category", "dataset") if key in record), None)
    if category is None:
        category = CODE if "task_id" in record else NO_CATEGORY
    if not isinstance(category, str) or not category.strip() or category == OVERALL:
        raise InvalidInput(f"{where} has the category {category!r}, wanted a name; leave the key out where there is none")
    system, turns, references = "", [], record.get("reference") or ()
    if isinstance(references, str):
        references = [references]
    if isinstance(talk := record.get("messages", record.get("conversations")), list):
        messages = conversation(where, talk)
        system = "\n".join(message["content"] for message in messages if message["role"] == "system")
        turns = [message["content"] for message in messages if message["role"] == "user"]
    elif isinstance(record.get("input_ids"), list):
        ids = record["input_ids"][: record.get("prompt_tokens") or None]
        if not ids or not all(type(token) is int for token in ids):
            raise InvalidInput(f"{where}: 'input_ids' is not a list of integers")
        return Question(str(given), category, ids=tuple(ids))
    else:
        asked = next((record[key] for key in ("turns", "instruction", "prompt", "text") if record.get(key) is not None), None)
        if asked is None:
            raise InvalidInput(f"{where} has keys {sorted(record)}, wanted {KINDS}")
        if isinstance(asked, list) and asked and isinstance(asked[0], dict):  # a prompt that is messages
            return _question(where, number, {**record, "messages": asked})
        turns = [asked] if isinstance(asked, str) else asked
        if record.get("instruction") is not None and record.get("input"):
            turns = [f"{asked}\n\n{record['input']}"]
        if "task_id" in record and not references and record.get("canonical_solution"):
            references = [record["canonical_solution"]]
    for name, texts in (("turns", turns), ("reference", references)):
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise InvalidInput(f"{where}: its {name} are {str(texts)[:60]!r}, wanted a list of strings")
        if not all(map(is_unicode, texts)):
            raise InvalidInput(f"{where}: its {name} are no valid Unicode: half of a surrogate pair is in them")
    if not turns or not all(text.strip() for text in turns):
        raise InvalidInput(f"{where} has an empty prompt")
    return Question(str(given), category, tuple(turns), system, tuple(references))


def _with_references(questions: list[Question], source: str | Path) -> list[Question]:
    """The questions with a file's answers: `{"question_id", "choices": [{"turns"}]}` or `{"question_id", "reference"}`."""
    found = {}
    for where, record in read_records(source):
        try:
            turns = record["reference"] if "reference" in record else record["choices"][0]["turns"]
            found[str(record["question_id"])] = tuple([turns] if isinstance(turns, str) else turns)
        except (KeyError, IndexError, TypeError):
            raise InvalidInput(f"{where} is no reference answer; wanted question_id and choices or reference") from None
    if not any(question.id in found for question in questions):
        raise InvalidInput(f"{source} answers none of these questions; their ids are {questions[0].id!r}, …")
    return [replace(question, references=found.get(question.id, question.references)) for question in questions]
