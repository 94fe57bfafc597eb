"""medusa judge: a chat model grades the answers of a benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa.cli import common, showing
from medusa.errors import InvalidInput
from medusa.runs.console import note


def judge_command(
    answers: Annotated[str, typer.Argument(help="answers.jsonl of `medusa bench` or `medusa experiment`.", show_default=False)],
    endpoint: Annotated[str, typer.Option(help="Address of an OpenAI-compatible server, up to /v1.")],
    judge_model: Annotated[str, typer.Option(help="Name of the judge's model on that server.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the grades (default: beside the answers); an unfinished run there is resumed."
        ),
    ] = None,
    api_key_env: common.EndpointKeyOption = "OPENAI_API_KEY",
    batch_size: Annotated[int, typer.Option(min=1, help="Number of requests at a time.")] = 8,
    tries: Annotated[int, typer.Option(min=1, help="Maximum number of requests for an answer's grade.")] = 3,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds allowed for one request.")] = 120.0,
    price_in: Annotated[float, typer.Option(min=0, help="Price per million tokens that the judge reads.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="Price per million tokens that the judge writes.")] = 0.0,
    as_json: common.JsonOption = False,
) -> None:
    """Grade answers from 1 to 10, each on its own, with a chat model. If interrupted, run the same command again to resume."""
    from medusa.evaluation.grading import default_folder, judge

    folder = output or default_folder(answers, judge_model)
    asking = {"api_key_env": api_key_env, "batch_size": batch_size, "tries": tries, "timeout": timeout}
    record = judge(answers, endpoint, judge_model, folder, price_in=price_in, price_out=price_out, **asking)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(record))
    elif any(part["grade"] is not None for parts in record["decoders"].values() for part in parts.values()):
        showing.print_table(*_table(record), title=f"Grades by {judge_model}")
    used = f"{record['prompt_tokens']} tokens read, {record['completion_tokens']} written, cost {record['cost']:.4f}"
    note(f"{used}; in {folder}")
    for reason, number in record["failed"].items():
        note(f"{number} answers have no grade: {reason}")
    if failed := sum(record["failed"].values()):
        raise InvalidInput(f"{failed} answers have no grade; the same command tries them again")


def _table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean grades, a row per category and a column per decoder; in brackets means by turn and the number of missing grades."""
    found = record["decoders"]
    categories = dict.fromkeys(category for parts in found.values() for category in parts)
    rows = [[category, *(_cell(parts.get(category)) for parts in found.values())] for category in categories]
    return ["category", *found], rows


def _cell(part: dict[str, Any] | None) -> str:
    if part is None or part["grade"] is None:
        return "no grade"
    turns = ", ".join("none" if grade is None else f"{grade:.2f}" for grade in part["by_turn"])
    missing = f"; {part['failed']} without" if part["failed"] else ""
    return f"{part['grade']:.2f}" + (f" ({turns}{missing})" if len(part["by_turn"]) > 1 or missing else "")
