"""`medusa.judge`: a strong chat model grades answers from 1 to 10, each on its own, as in MT-Bench (paper 3.2)."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from medusa.data.endpoint import Endpoint, EndpointError, EndpointRefused
from medusa.data.samples import read_records
from medusa.errors import InvalidInput
from medusa.runs.console import progress
from medusa.runs.files import digest, write_json
from medusa.runs.records import Journal, claim

CLAIM, GRADES = "judge.yaml", "grades.jsonl"
ANSWER_TOKENS = 1024  # maximum length of the judge's answer
CHECKED = ("math", "cod", "reason")  # parts of the names of categories whose answers are right or wrong

SYSTEM = (
    "You grade what an assistant answered. Be strict and even-handed: weigh whether the answer is correct, does what was "
    "asked, is complete, and is clear; length as such counts for nothing. First say in a few sentences what is good and "
    "what is wrong. Then end with a line of its own, `Grade: N`, where N is a whole number from 1 (useless) to 10 (could "
    "not be better)."
)
REFERENCE = "A correct answer, to compare with; other ways of being correct are as good:"
LATER_TURN = "Grade the last answer alone; what came before it is shown so that you can follow."
_GRADE = re.compile(r"\bgrade\b[\s:=*_`]*(\d+(?:\.\d+)?)", re.IGNORECASE)


def judge(
    answers: str | Path,
    endpoint: str,
    judge_model: str,
    output: str | Path | None = None,
    *,
    api_key_env: str = "OPENAI_API_KEY",
    batch_size: int = 8,
    tries: int = 3,
    timeout: float = 120.0,
    price_in: float = 0.0,
    price_out: float = 0.0,
) -> dict[str, Any]:
    """Have a chat model grade the answers that `medusa.bench` saved; return the record that is saved as `judge.json`.

        record = medusa.judge("bench/answers.jsonl", "http://localhost:8000/v1", "my-judge")
        record["decoders"]["medusa"]["overall"]["grade"]

    If interrupted, the same call resumes. Answers without a grade are counted in `failed`; the same call tries them again.

    Args:
        answers: `answers.jsonl` of a benchmark.
        endpoint: address of an OpenAI-compatible server, up to /v1.
        judge_model: name of the judge's model on that server.
        output: folder for the grades; None: `default_folder`.
        api_key_env: environment variable that holds the endpoint's API key.
        batch_size: number of requests at a time.
        tries: maximum number of requests for an answer's grade.
        timeout: seconds allowed for one request.
        price_in, price_out: prices per million tokens that the judge reads and writes, for the record's `cost`.

    Raises:
        MedusaError: broken answers, a folder with another judge's grades, or an endpoint that refuses any request.
    """
    tasks = read_tasks(answers)
    folder = Path(output) if output is not None else default_folder(answers, judge_model)
    journal = Journal(folder / GRADES, "grade of a judge")
    claim(folder / CLAIM, {"judge_model": judge_model, "instructions": SYSTEM})
    judging = Endpoint(endpoint, judge_model, os.environ.get(api_key_env), timeout=timeout)
    failed = grade_tasks(tasks, judging, journal, batch_size, tries)
    used = spent(journal)
    record: dict[str, Any] = {
        "judge_model": judge_model,
        "answers": str(answers),
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "cost": used.cost(price_in, price_out),
        "failed": dict(failed.most_common()),
        "decoders": grades(tasks, journal),
    }
    write_json(folder / "judge.json", record)
    return record


def default_folder(answers: str | Path, judge_model: str) -> Path:
    """The folder for a judge's grades: `judge-MODEL` beside the answers."""
    return Path(answers).parent / f"judge-{judge_model.replace('/', '-')}"


@dataclass(frozen=True)
class Task:
    """One answer to grade, and the names of all decoders that gave it."""

    id: str
    category: str
    turn: int  # from 0
    messages: tuple[dict[str, str], ...]
    decoders: tuple[str, ...]


@dataclass(frozen=True)
class Spent:
    """The tokens that judging has used."""

    prompt_tokens: int
    completion_tokens: int

    def cost(self, price_in: float, price_out: float) -> float:
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


def read_tasks(source: str | Path) -> list[Task]:
    """The answers in a file of `medusa bench`, one task for all decoders that gave the same; InvalidInput if it is broken."""
    tasks = []
    for where, record in read_records(source):
        try:
            question, category = str(record["id"]), str(record.get("category", "all"))
            turns, references = list(record["turns"]), list(record.get("references") or ())
            answers = {str(name): list(given) for name, given in record["answers"].items()}
        except (KeyError, TypeError, AttributeError):
            raise InvalidInput(
                f"{where} is not an answer of `medusa bench`; expected an object with id, turns and answers"
            ) from None
        checked = any(part in category.lower() for part in CHECKED)
        decoders_of: dict[tuple[str, ...], list[str]] = {}
        for name, given in answers.items():
            if len(given) > len(turns) or not all(isinstance(text, str) for text in (*given, *turns, *references)):
                raise InvalidInput(f"{where}: the answers of {name!r} are not a list of strings, one per turn")
            for turn in range(len(given)):
                decoders_of.setdefault(tuple(given[: turn + 1]), []).append(name)
        for shown, names in decoders_of.items():
            turn = len(shown) - 1
            reference = references[turn] if turn < len(references) and checked else None
            messages = judge_messages(turns, shown, reference)
            tasks.append(Task(f"{question}/{turn}/{digest(messages)[:12]}", category, turn, messages, tuple(names)))
    if not tasks:
        raise InvalidInput(f"{source} holds no answers")
    return tasks


def judge_messages(turns: Sequence[str], answers: Sequence[str], reference: str | None) -> tuple[dict[str, str], ...]:
    """The conversation that asks the judge for a grade of the last answer."""
    blocks = []
    for turn, answer in zip(turns, answers, strict=False):
        blocks += [f"[User]\n{turn.strip()}", f"[Assistant]\n{answer.strip() or '(said nothing)'}"]
    if reference is not None:
        blocks.append(f"{REFERENCE}\n[Reference]\n{reference.strip()}")
    if len(answers) > 1:
        blocks.append(LATER_TURN)
    return {"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n\n".join(blocks)}


def read_grade(text: str) -> float | None:
    """The grade that a verdict ends with; None if there is none from 1 to 10.

    >>> read_grade("Clear but wrong in part. Grade: 6"), read_grade("**Grade:** 8/10"), read_grade("Grade: 11")
    (6.0, 8.0, None)
    """
    found = _GRADE.findall(text)
    grade = float(found[-1]) if found else 0.0
    return grade if 1 <= grade <= 10 else None


def grade_tasks(tasks: Sequence[Task], endpoint: Endpoint, journal: Journal, at_once: int = 8, tries: int = 3) -> Counter[str]:
    """Grade every answer without a grade, with `tries` requests for each, `at_once` at a time; return the number of failures by
    reason. The next run tries these again. EndpointRefused if the endpoint would refuse any request; grades already given are
    kept."""
    failed: Counter[str] = Counter()
    lock = threading.Lock()

    def work(task: Task) -> str | None:
        record = _grade(task, endpoint, tries)
        with lock:  # written by the worker: a paid-for answer must survive a crash of the consumer
            before = journal.records.get(task.id, {})  # failed runs cost something too
            for name in ("prompt_tokens", "completion_tokens"):
                record[name] += before.get(name, 0)
            journal.add(record)
        return record["failure"]

    left = [task for task in tasks if not is_graded(journal, task)]
    with progress("Judging", len(tasks), "answers", len(tasks) - len(left)) as bar:
        for failure in endpoint.concurrently(work, left, at_once):
            if failure is not None:
                failed[failure] += 1
            bar.update()
    return failed


def is_graded(journal: Journal, task: Task) -> bool:
    return journal.records.get(task.id, {}).get("grade") is not None


def _grade(task: Task, endpoint: Endpoint, tries: int) -> dict[str, Any]:
    """The record of one task: its grade, or the reason why there is none."""
    record: dict[str, Any] = {"id": task.id, "turn": task.turn + 1, "grade": None, "verdict": None, "failure": None}
    spent = {"prompt_tokens": 0, "completion_tokens": 0}
    for attempt in range(tries):
        try:
            # At temperature 0 the judge would repeat itself.
            answer = endpoint.chat(task.messages, temperature=0.0 if attempt == 0 else 0.7, max_tokens=ANSWER_TOKENS)
        except EndpointRefused:
            raise  # the next request would be refused as well
        except EndpointError as error:
            record["failure"] = str(error)
            break
        spent["prompt_tokens"] += answer.prompt_tokens
        spent["completion_tokens"] += answer.completion_tokens
        record["verdict"], record["grade"] = answer.text, read_grade(answer.text)
        if record["grade"] is not None:
            break
    else:
        record["failure"] = f"no grade from 1 to 10 in {tries} verdicts"
    return {**record, **spent}


def spent(journal: Journal) -> Spent:
    """The tokens of all runs in a journal."""
    records = journal.records.values()
    return Spent(sum(record["prompt_tokens"] for record in records), sum(record["completion_tokens"] for record in records))


def grades(tasks: Sequence[Task], journal: Journal) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean grades by decoder and category, `overall` first, over all turns and by turn; and the number without a grade."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    names = list(dict.fromkeys(name for task in tasks for name in task.decoders))
    for name in names:
        own = [task for task in tasks if name in task.decoders]
        categories = dict.fromkeys(task.category for task in own)
        found[name] = {"overall": _means(own, journal)}
        for category in categories:
            found[name][category] = _means([task for task in own if task.category == category], journal)
    return found


def _means(tasks: Collection[Task], journal: Journal) -> dict[str, Any]:
    graded = [(task.turn, journal.records[task.id]["grade"]) for task in tasks if is_graded(journal, task)]
    by_turn = {turn: [grade for at, grade in graded if at == turn] for turn in sorted({task.turn for task in tasks})}
    return {
        "grade": fmean(grade for _, grade in graded) if graded else None,
        "by_turn": [fmean(given) if given else None for given in by_turn.values()],
        "graded": len(graded),
        "failed": len(tasks) - len(graded),
    }
