"""Answers: decoders answer the same prompt set in turn, and every answer is saved as soon as it is complete."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medusa.data.prompt_sets import Prompter, Question
from medusa.errors import InvalidInput
from medusa.evaluation.decoders import Decoded, Decoder
from medusa.evaluation.entries import Entry
from medusa.evaluation.measurement import Measurement, in_turn, time_run
from medusa.evaluation.quality import Scorer
from medusa.evaluation.report import summarise
from medusa.model import MedusaModel
from medusa.runs.console import note, progress
from medusa.runs.files import digest, write_text
from medusa.runs.records import Journal, claim

BENCH_FILE, RUNS_FILE, ANSWERS_FILE = "bench.yaml", "runs.jsonl", "answers.jsonl"


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """The questions of a bench and the limits of their answers, the same for all decoders."""

    questions: list[Question]
    left_out: list[Question]  # questions whose prompts are empty or leave no room for an answer
    prompter: Prompter
    room: int | None  # length of the longest prompt that leaves room for an answer; None: any
    limits: dict[str, Any]  # options of every decoder: `max_new_tokens`, and the ids that end an answer

    @classmethod
    def of(cls, model: MedusaModel, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int) -> PromptSet:
        """The questions that fit a model's context; the others are noted. InvalidInput if none fits."""
        stops = sorted({*model.eos_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
        prompter = Prompter(tokenizer, stops)
        room = None if model.max_length is None else model.max_length - max_new_tokens
        fit, others = fitting(questions, prompter, room)
        if not fit:
            raise InvalidInput(f"no prompt fits the context of {model.max_length} with {max_new_tokens} new tokens")
        if others:
            names = ", ".join(question.id for question in others)
            note(f"left out, since their prompts are empty or too long for the context: {names}")
        return cls(fit, others, prompter, room, {"max_new_tokens": max_new_tokens, "eos_token_id": stops or None})

    @property
    def digest(self) -> str:
        return digest([dataclasses.asdict(question) for question in self.questions])


def fitting(questions: Sequence[Question], prompter: Prompter, room: int | None) -> tuple[list[Question], list[Question]]:
    """The questions whose first prompt leaves room for an answer, and the others."""
    fit: list[Question] = []
    others: list[Question] = []
    for question in questions:
        length = len(prompter.ids(question))
        (fit if 0 < length <= (length if room is None else room) else others).append(question)
    return fit, others


def measure_entries(
    entries: Mapping[str, Entry],
    prompt_set: PromptSet,
    folder: Path,
    made_with: dict[str, Any],
    rounds: int,
    scorer: Scorer | None = None,
) -> dict[str, Any]:
    """Have all entries answer a prompt set, resuming from the folder (see `claim`); the record is that of `results.json`. All
    answers are written as text, for a judge."""
    decoders, questions, prompter = (
        {name: entry.decoder for name, entry in entries.items()},
        prompt_set.questions,
        prompt_set.prompter,
    )
    journal = Journal(folder / RUNS_FILE, "run of a bench")
    claim(folder / BENCH_FILE, made_with)
    answer_questions(decoders, questions, prompter, journal, rounds, prompt_set.room)
    measured = measurements(journal, questions, list(decoders), rounds)
    answers = answer_records(questions, measured, prompter)
    write_text(folder / ANSWERS_FILE, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    exact = [name for name, entry in entries.items() if entry.exact]
    record = {
        "made_with": made_with,
        "rounds": rounds,
        "left_out": [question.id for question in prompt_set.left_out],
        "decoders": summarise(measured, questions, exact, scorer),
    }
    return json.loads(json.dumps(record))  # as it will be read again: tuples become lists


def answer_questions(
    decoders: dict[str, Decoder],
    questions: Sequence[Question],
    prompter: Prompter,
    journal: Journal,
    rounds: int,
    room: int | None,  # length of the longest prompt that leaves room for an answer; a longer turn ends its conversation
) -> None:
    """Have every decoder answer every question in every round, in turn within each; runs found in the journal are not repeated.

    Each decoder answers the first question once beforehand, untimed.
    """
    names = list(decoders)
    order = [
        (question, name, round_)
        for number, question in enumerate(questions)
        for round_ in range(rounds)
        for name in in_turn(names, number + round_)
    ]
    unfinished = {name for question, name, round_ in order if run_id(question, name, round_) not in journal.records}
    for name in names:
        if name in unfinished:
            converse(decoders[name], questions[0], prompter, room)
    with progress("measuring", len(order), "answers") as bar:
        for question, name, round_ in order:
            identifier = run_id(question, name, round_)
            if identifier not in journal.records:
                decoded = converse(decoders[name], question, prompter, room)
                journal.add({"id": identifier, **dataclasses.asdict(decoded)})
            bar.update()


def run_id(question: Question, name: str, round_: int) -> str:
    return f"{question.id}/{name}/{round_}"


def converse(decoder: Decoder, question: Question, prompter: Prompter, room: int | None) -> Decoded:
    """The turns of a question one after another, each after the decoder's own answers to those before; one row per turn."""
    runs: list[Decoded] = []
    for _ in question.turns or question.ids[:1]:
        ids = prompter.ids(question, [run.tokens[0] for run in runs])
        if runs and room is not None and len(ids) > room:
            break
        runs.append(time_run(decoder, torch.tensor([ids])))
    return Decoded.together(runs)


def measurements(journal: Journal, questions: Sequence[Question], names: Sequence[str], rounds: int) -> dict[str, Measurement]:
    """The journal's runs by decoder, an item per question."""

    def runs_of(question: Question, name: str) -> list[Decoded]:
        records = [journal.records[run_id(question, name, round_)] for round_ in range(rounds)]
        return [Decoded(**{field.name: record[field.name] for field in dataclasses.fields(Decoded)}) for record in records]

    return {name: Measurement([runs_of(question, name) for question in questions]) for name in names}


def answer_records(questions: Sequence[Question], measured: dict[str, Measurement], prompter: Prompter) -> list[dict[str, Any]]:
    """The answers of all decoders as text, one record per question, as a judge reads them."""
    return [
        {
            "id": question.id,
            "category": question.category,
            "turns": prompter.turns(question),
            "answers": {name: [prompter.text(row) for row in each.outputs[n]] for name, each in measured.items()},
            "references": question.references,
        }
        for n, question in enumerate(questions)
    ]
