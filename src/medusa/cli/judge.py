"""medusa judge: a chat model grades what the decoders of a bench answered."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa.cli import common, showing
from medusa.errors import InvalidInput


def judge_command(
    answers: Annotated[str, typer.Argument(help="answers.jsonl of `medusa bench` or `medusa experiment`.", show_default=False)],
    endpoint: Annotated[str, typer.Option("--endpoint", help="An OpenAI-compatible address, up to /v1.")],
    judge_model: Annotated[str, typer.Option("--judge-model", help="The judge's name there.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the grades (default: beside); a run there is gone on with."),
    ] = None,
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", help="Environment variable with the endpoint's key.")
    ] = "OPENAI_API_KEY",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Requests under way.")] = 8,
    tries: Annotated[int, typer.Option("--tries", help="How often the judge is asked where its answer has no grade.")] = 3,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for one request.")] = 120.0,
    price_in: Annotated[float, typer.Option("--price-in", help="Of a million tokens that the judge reads.")] = 0.0,
    price_out: Annotated[float, typer.Option("--price-out", help="Of a million tokens that the judge writes.")] = 0.0,
    as_json: common.JsonOption = False,
) -> None:
    """Grade answers from 1 to 10, each by itself, in the manner of MT-Bench. Killed, it goes on where it was."""
    for name, value in (("batch-size", batch_size), ("tries", tries)):
        if value < 1:
            raise InvalidInput(f"--{name} is {value}, wanted at least 1")
    for name, price in (("timeout", timeout), ("price-in", price_in), ("price-out", price_out)):
        if price < 0:
            raise InvalidInput(f"--{name} is {price}, wanted at least 0")
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from medusa.data.endpoint import Endpoint
    from medusa.evaluation.grading import CLAIM, GRADES, SYSTEM, grade_tasks, grades, is_graded, read_tasks, spent
    from medusa.runs.files import write_text
    from medusa.runs.records import Journal, claim

    tasks = read_tasks(answers)
    folder = output or Path(answers).parent / f"judge-{judge_model.replace('/', '-')}"
    journal = Journal(folder / GRADES, "grade of a judge")
    claim(folder / CLAIM, {"judge_model": judge_model, "instructions": SYSTEM})
    asked = Endpoint(endpoint, judge_model, os.environ.get(api_key_env), timeout=timeout)
    already = sum(is_graded(journal, task) for task in tasks)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("judging", total=len(tasks), completed=already)
        failed = grade_tasks(tasks, asked, journal, batch_size, tries, lambda: progress.advance(bar))
    used = spent(journal)
    record: dict[str, Any] = {
        "judge_model": judge_model,
        "answers": answers,
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "cost": used.cost(price_in, price_out),
        "failed": dict(failed),
        "decoders": grades(tasks, journal),
    }
    write_text(folder / "judge.json", json.dumps(record, indent=2) + "\n")
    if as_json:
        print(json.dumps(record))
    elif any(part["grade"] is not None for parts in record["decoders"].values() for part in parts.values()):
        showing.print_table(*_table(record), title=f"Grades by {judge_model}")
    common.note(f"{used.prompt_tokens} tokens read, {used.completion_tokens} written, cost {record['cost']:.4f}; in {folder}")
    for reason, number in failed.most_common():
        common.note(f"{number} answers have no grade: {reason}")
    if failed:
        raise InvalidInput(f"{failed.total()} answers have no grade; the same command tries them again")


def _table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean grades, a row per category and a column per decoder; in brackets those by turn, and what has no grade."""
    found = record["decoders"]
    categories = dict.fromkeys(category for parts in found.values() for category in parts)
    rows = [[category, *(_cell(parts.get(category)) for parts in found.values())] for category in categories]
    return ["category", *found], rows


def _cell(part) -> str:
    if part is None or part["grade"] is None:
        return "no grade"
    turns = ", ".join("none" if grade is None else f"{grade:.2f}" for grade in part["by_turn"])
    missing = f"; {part['failed']} without" if part["failed"] else ""
    return f"{part['grade']:.2f}" + (f" ({turns}{missing})" if len(part["by_turn"]) > 1 or missing else "")
