"""Prompt sets: published files, a user's own, and the embedded model's held-out code; their prompts as token ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa.data.prompts import opening_ids
from medusa.data.samples import Asked, read_prompts, read_records
from medusa.errors import InvalidInput
from medusa.runs.files import is_unicode

HELD_OUT = "held-out"
HELD_OUT_FILE = Path(__file__).parent.parent / "assets" / "pycode-16m" / "held_out.jsonl"
HUB_SETS = {"mt-bench": "HuggingFaceH4/mt_bench_prompts", "humaneval": "openai/openai_humaneval:test"}
CODE = "code"  # the category of sets that are code alone
NO_CATEGORY, OVERALL = "all", "overall"


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt of the embedded model: 256 tokens of a file of the Python 3.11 standard library."""

    source: str
    split: str  # "test", or "calibration" for the tree search
    ids: Tensor  # (P,) long


def held_out_prompts(split: str = "test") -> list[Prompt]:
    """Held-out prompts that ship with the embedded model; neither its backbone nor its heads saw their files."""
    records = map(json.loads, HELD_OUT_FILE.read_text(encoding="utf-8").splitlines())
    return [Prompt(each["source"], split, torch.tensor(each["input_ids"])) for each in records if each["split"] == split]


@dataclass(frozen=True)
class Question:
    """A question for decoders, of one turn or several."""

    id: str
    category: str
    turns: tuple[str, ...] = ()  # the user's turns; each follows the decoder's own answer to the turn before
    system: str = ""
    references: tuple[str, ...] = ()  # a good answer to every turn, for a judge; may be empty
    ids: tuple[int, ...] = ()  # a prompt given as token ids, in place of turns


def read_questions(source: str | Path, references: str | Path | None = None) -> list[Question]:
    """The questions of a set, in its order.

    The formats are those of `read_prompts`. Records of MT-Bench and Spec-Bench also have a `category`, some a `reference`,
    AlpacaEval's `dataset` is its category, and HumanEval's records have a `task_id` and are code.

    Args:
        source: `held-out`, `mt-bench`, `humaneval`, a file or folder, or a hub id.
        references: a file of reference answers by `question_id`, as MT-Bench has them.

    Raises:
        InvalidInput: no such set, a broken file, a record without a prompt or with an empty category, or two with one id.
    """
    if source == HELD_OUT:
        seen: Counter[str] = Counter()
        questions = []
        for prompt in held_out_prompts():
            seen[prompt.source] += 1
            identifier = f"{prompt.source}:{seen[prompt.source]}"
            questions.append(Question(identifier, CODE, ids=tuple(prompt.ids.tolist())))
    else:
        found = read_prompts(HUB_SETS.get(str(source), source))
        questions = [_question(number, asked) for number, asked in enumerate(found, 1)]
    if not questions:
        raise InvalidInput(f"{source} holds no prompts")
    twice = [identifier for identifier, times in Counter(q.id for q in questions).items() if times > 1]
    if twice:
        raise InvalidInput(f"{source} has {twice[0]!r} as the id of several questions; ids must differ")
    return questions if references is None else _with_references(questions, references)


def default_prompts(model: str, prompts: str | None) -> str:
    """The name of the prompt set; the embedded model has its own. InvalidInput if none is given for another model."""
    if prompts is None and model != "embedded":
        raise InvalidInput("no prompts; pass --prompts with a set, a file or a hub id (held-out belongs to `embedded`)")
    return prompts or HELD_OUT


def select(questions: Sequence[Question], categories: Sequence[str] = (), limit: int | None = None) -> list[Question]:
    """The questions of some categories, and of these a number spread evenly; InvalidInput if a category has none."""
    known = dict.fromkeys(question.category for question in questions)
    for category in categories:
        if category not in known:
            raise InvalidInput(f"there are no questions of category {category!r}; the categories are {', '.join(known)}")
    chosen = [question for question in questions if not categories or question.category in categories]
    if limit is None or limit >= len(chosen):
        return chosen
    if limit < 1:
        raise InvalidInput(f"the limit of prompts is {limit}, expected at least 1")
    return [chosen[n * len(chosen) // limit] for n in range(limit)]


def _question(number: int, asked: Asked) -> Question:
    where, record = asked.source, asked.record
    given = next((record[key] for key in ("question_id", "task_id", "prompt_id", "id") if record.get(key) is not None), number)
    category = next((record[key] for key in ("category", "dataset") if key in record), None)
    if category is None:
        category = CODE if "task_id" in record else NO_CATEGORY
    if not isinstance(category, str) or not category.strip() or category == OVERALL:
        raise InvalidInput(f"{where} has the category {category!r}, expected a name; leave the key out if there is none")
    references = record.get("reference") or (record.get("canonical_solution") if "task_id" in record else None) or ()
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list | tuple) or not all(isinstance(text, str) for text in references):
        raise InvalidInput(f"{where}: its references are {str(references)[:60]!r}, expected a list of strings")
    if not all(map(is_unicode, references)):
        raise InvalidInput(f"{where}: its references are not valid Unicode: they contain half of a surrogate pair")
    return Question(str(given), category, asked.turns, asked.system, tuple(references), asked.ids)


def _with_references(questions: list[Question], source: str | Path) -> list[Question]:
    """The questions with a file's answers: `{"question_id", "choices": [{"turns"}]}` or `{"question_id", "reference"}`."""
    found = {}
    for where, record in read_records(source):
        try:
            turns = record["reference"] if "reference" in record else record["choices"][0]["turns"]
            found[str(record["question_id"])] = tuple([turns] if isinstance(turns, str) else turns)
        except (KeyError, IndexError, TypeError):
            raise InvalidInput(f"{where} is not a reference answer; expected question_id and choices or reference") from None
    if not any(question.id in found for question in questions):
        raise InvalidInput(f"{source} has no answer to any of these questions, whose ids are {questions[0].id!r}, …")
    return [replace(question, references=found.get(question.id, question.references)) for question in questions]


class Prompter:
    """Questions as token ids: formatted with the tokenizer's chat template, or simply concatenated if it has none.

    Args:
        stops: ids that end an answer; they are not part of its text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int]):
        self._tokenizer, self._stops = tokenizer, set(stops)
        self.chat = bool(tokenizer.chat_template)

    def ids(self, question: Question, answers: Sequence[Sequence[int]] = ()) -> list[int]:
        """The prompt for the first turn that has no answer yet, given the token ids of the answers to the turns before."""
        if question.ids:
            return list(question.ids)
        if self.chat:
            return self._templated(question, answers)
        first = f"{question.system}\n{question.turns[0]}" if question.system else question.turns[0]
        ids = list(self._tokenizer(first, verbose=False)["input_ids"])
        for answer, turn in zip(answers, question.turns[1:], strict=False):
            following = self._tokenizer(f"\n{turn}\n", add_special_tokens=False, verbose=False)["input_ids"]
            ids += [*self._without_stop(answer), *following]
        return ids

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, or of a prompt given as ids."""
        return self._tokenizer.decode(self._without_stop(tokens), skip_special_tokens=True)

    def turns(self, question: Question) -> list[str]:
        """The text of the user's turns."""
        return [self.text(question.ids)] if question.ids else list(question.turns)

    def _templated(self, question: Question, answers: Sequence[Sequence[int]]) -> list[int]:
        messages = [{"role": "system", "content": question.system}] if question.system else []
        for number, turn in enumerate(question.turns[: len(answers) + 1]):
            messages.append({"role": "user", "content": turn})
            if number < len(answers):
                messages.append({"role": "assistant", "content": self.text(answers[number])})
        return opening_ids(self._tokenizer, messages, "assistant", f"question {question.id}")

    def _without_stop(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens[:-1] if tokens and tokens[-1] in self._stops else tokens)


def calibration_ids(
    questions: Sequence[Question] | None, prompter: Prompter, limit: int, prompt_tokens: int, room: int | None
) -> list[Tensor]:
    """Prompts to calibrate on, each (P,) long, spread evenly over the questions.

    Args:
        questions: None: the embedded model's calibration prompts.
        limit: maximum number of prompts.
        prompt_tokens: number of tokens kept of each text; conversations are not cut.
        room: length of the longest prompt that can be used; None: any.

    Raises:
        InvalidInput: no prompt is short enough.
    """
    if questions is None:
        return [prompt.ids[:prompt_tokens] for prompt in held_out_prompts("calibration")[:limit]]
    found = [prompter.ids(question) for question in questions]
    if not prompter.chat:
        found = [ids[:prompt_tokens] for ids in found]
    found = [ids for ids in found if ids and (room is None or len(ids) <= room)]
    if not found:
        raise InvalidInput("no prompt leaves room for the new tokens in the context; give others, or fewer new tokens")
    stride = max(1, len(found) // limit)
    return [torch.tensor(ids) for ids in found[::stride][:limit]]
