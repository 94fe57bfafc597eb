"""The bench: decoders answer the same questions in turn, every answer kept as it comes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from medusa.errors import InvalidInput, one_line
from medusa.evaluation.compare import Measurement, in_turn, measure
from medusa.evaluation.decoders import Decoded, Decoder
from medusa.evaluation.prompts import Question
from medusa.evaluation.quality import code_compiles, distinct_ngrams, log_likelihood
from medusa.model import MedusaModel
from medusa.runs.files import write_text
from medusa.runs.records import Journal, claim

CLAIM, RUNS, ANSWERS = "bench.yaml", "runs.jsonl", "answers.jsonl"


class Asking:
    """Questions as token ids: under the tokenizer's chat template, or one turn after the other where it has none.

    Args:
        stops: ids that end an answer and are no part of its text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[int]):
        self._tokenizer, self._stops = tokenizer, set(stops)
        self.chat = bool(tokenizer.chat_template)

    def prompt(self, question: Question, answers: Sequence[Sequence[int]]) -> list[int]:
        """What comes before the answer to the turn after those that are answered.

        Raises:
            InvalidInput: the chat template refuses the conversation.
        """
        if question.ids:
            return list(question.ids)
        if self.chat:
            return self._templated(question, answers)
        first = f"{question.system}\n{question.turns[0]}" if question.system else question.turns[0]
        ids = list(self._tokenizer(first, verbose=False)["input_ids"])
        for answer, turn in zip(answers, question.turns[1:], strict=False):
            following = self._tokenizer(f"\n{turn}\n", add_special_tokens=False, verbose=False)["input_ids"]
            ids += [*self._spoken(answer), *following]
        return ids

    def text(self, tokens: Sequence[int]) -> str:
        """An answer, or a prompt given as ids, in words."""
        return self._tokenizer.decode(self._spoken(tokens), skip_special_tokens=True)

    def turns(self, question: Question) -> list[str]:
        """The user's turns in words."""
        return [self.text(question.ids)] if question.ids else list(question.turns)

    def _templated(self, question: Question, answers: Sequence[Sequence[int]]) -> list[int]:
        messages = [{"role": "system", "content": question.system}] if question.system else []
        for number, turn in enumerate(question.turns[: len(answers) + 1]):
            messages.append({"role": "user", "content": turn})
            if number < len(answers):
                messages.append({"role": "assistant", "content": self.text(answers[number])})
        try:
            return list(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except Exception as error:  # jinja2's, which templates raise on roles they do not take
            raise InvalidInput(f"the model's chat template refuses question {question.id}: {one_line(error)}") from None

    def _spoken(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens[:-1] if tokens and tokens[-1] in self._stops else tokens)


@dataclasses.dataclass(frozen=True)
class Exam:
    """Questions for decoders of one backbone's tokens, and how their answers end: the same for all.

    Attributes:
        left_out: questions whose prompts are empty or leave no room for an answer.
        room: the longest prompt that leaves room for an answer; None where the context has no end.
        limits: options of every decoder: the most new tokens, and the ids that end an answer.
    """

    questions: list[Question]
    left_out: list[Question]
    asking: Asking
    room: int | None
    limits: dict[str, Any]

    @classmethod
    def of(cls, model: MedusaModel, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int) -> Exam:
        """The exam of those questions that fit a model's context.

        Raises:
            InvalidInput: none fits.
        """
        stops = sorted({*model.eos_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
        asking = Asking(tokenizer, stops)
        room = None if model.max_length is None else model.max_length - max_new_tokens
        fit, others = fitting(questions, asking, room)
        if not fit:
            raise InvalidInput(f"no prompt fits the context of {model.max_length} with {max_new_tokens} new tokens")
        return cls(fit, others, asking, room, {"max_new_tokens": max_new_tokens, "eos_token_id": stops or None})

    @property
    def digest(self) -> str:
        """Of the questions: other ones have another."""
        told = json.dumps([dataclasses.asdict(question) for question in self.questions])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def take(
    exam: Exam,
    decoders: dict[str, Decoder],
    folder: Path,
    made_with: dict[str, Any],
    rounds: int,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Measurement]:
    """Have decoders take an exam, every answer kept in a folder, which is gone on from; in the end all of them in words, for a
    judge.

    Raises:
        InvalidInput: the folder was made with something else.
    """
    journal = Journal(folder / RUNS, "run of a bench")
    claim(folder / CLAIM, made_with)
    run_bench(decoders, exam.questions, exam.asking, journal, rounds, exam.room, on_progress)
    measured = measurements(journal, exam.questions, list(decoders), rounds)
    answers = answer_records(exam.questions, measured, exam.asking)
    write_text(folder / ANSWERS, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    return measured


def run_bench(
    decoders: dict[str, Decoder],
    questions: Sequence[Question],
    asking: Asking,
    journal: Journal,
    rounds: int,
    room: int | None,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Have every decoder answer every question in every round, in turn within each; what the journal holds is not run again.

    Each decoder answers the first question once beforehand, untimed.

    Args:
        room: the longest prompt that leaves room for an answer; a turn that is longer ends its conversation.
        on_progress: called after every run, done now or before.
    """
    names = list(decoders)
    order = [
        (question, name, round_)
        for number, question in enumerate(questions)
        for round_ in range(rounds)
        for name in in_turn(names, number + round_)
    ]
    left = {name for question, name, round_ in order if run_id(question, name, round_) not in journal.records}
    for name in names:
        if name in left:
            converse(decoders[name], questions[0], asking, room)
    for question, name, round_ in order:
        identifier = run_id(question, name, round_)
        if identifier not in journal.records:
            decoded = converse(decoders[name], question, asking, room)
            journal.add({"id": identifier, **dataclasses.asdict(decoded)})
        on_progress()


def run_id(question: Question, name: str, round_: int) -> str:
    return f"{question.id}/{name}/{round_}"


def converse(decoder: Decoder, question: Question, asking: Asking, room: int | None) -> Decoded:
    """A question's turns one after the other, each after the decoder's own answers to those before; a row each."""
    runs: list[Decoded] = []
    for _ in question.turns or question.ids[:1]:
        ids = asking.prompt(question, [run.tokens[0] for run in runs])
        if runs and room is not None and len(ids) > room:
            break
        runs.append(measure(decoder, torch.tensor([ids])))
    return Decoded.together(runs)


def fitting(questions: Sequence[Question], asking: Asking, room: int | None) -> tuple[list[Question], list[Question]]:
    """The questions whose first prompt leaves room for an answer, and the others."""
    fit: list[Question] = []
    others: list[Question] = []
    for question in questions:
        length = len(asking.prompt(question, []))
        (fit if 0 < length <= (length if room is None else room) else others).append(question)
    return fit, others


def measurements(journal: Journal, questions: Sequence[Question], names: Sequence[str], rounds: int) -> dict[str, Measurement]:
    """What the journal holds of these runs, an item per question."""

    def run(question: Question, name: str, round_: int) -> Decoded:
        record = journal.records[run_id(question, name, round_)]
        return Decoded(**{field.name: record[field.name] for field in dataclasses.fields(Decoded)})

    return {
        name: Measurement([[run(question, name, round_) for round_ in range(rounds)] for question in questions])
        for name in names
    }


def answer_records(questions: Sequence[Question], measured: dict[str, Measurement], asking: Asking) -> list[dict[str, Any]]:
    """What every decoder answered, in words, as a judge reads it."""
    return [
        {
            "id": question.id,
            "category": question.category,
            "turns": asking.turns(question),
            "answers": {name: [asking.text(row) for row in each.outputs[n]] for name, each in measured.items()},
            "references": question.references,
        }
        for n, question in enumerate(questions)
    ]


class Scorer:
    """Quality without a judge, of answers to questions; an answer that several decoders gave is scored once.

    Args:
        model: whose backbone's likelihood counts.
    """

    def __init__(self, model: MedusaModel, asking: Asking):
        self._model, self._asking = model, asking
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}

    def __call__(self, questions: Sequence[Question], answers: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
        """Figures over all answers, given per question and turn."""
        likelihood, tokens, compiles = 0.0, 0, []
        for question, given in zip(questions, answers, strict=True):
            turns = self._asking.turns(question)
            for number, answer in enumerate(given):
                prompt = self._asking.prompt(question, given[:number])
                likelihood += self._likelihood(prompt, answer)
                tokens += len(answer)
                continues = number == 0 and (bool(question.ids) or not self._asking.chat)
                compiles.append(code_compiles(turns[number], self._asking.text(answer), continues))
        code = [good for good in compiles if good is not None]
        rows = [answer for given in answers for answer in given]
        return {
            "log_likelihood_per_token": likelihood / tokens,
            **{f"distinct_{n}": distinct_ngrams(rows, n) for n in (1, 2, 3)},
            "answers_with_code": len(code),
            "code_that_compiles": sum(code) / len(code) if code else None,
        }

    def _likelihood(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        key = tuple(prompt), tuple(answer)
        if key not in self._known:
            self._known[key] = log_likelihood(self._model, prompt, answer)
        return self._known[key]
