"""An experiment run: its decoders on the same questions, as a record and as a page with the paper's figures beside."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa.data.prompt_sets import OVERALL
from medusa.errors import InvalidInput
from medusa.evaluation.answers import Exam, Scorer, take
from medusa.evaluation.catalog import EXPERIMENTS, Contenders, Experiment, Subject
from medusa.evaluation.report import GENERATE, cells, circumstances, summarise, table, told
from medusa.runs.files import write_text


def named(name: str) -> Experiment:
    """An experiment by name; InvalidInput where there is none."""
    if name not in EXPERIMENTS:
        raise InvalidInput(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def run(
    name: str,
    subject: Subject,
    contenders: Contenders,
    exam: Exam,
    scorer: Scorer | None,
    folder: Path,
    made_with: dict[str, Any],
    rounds: int = 1,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure an experiment's contenders, going on from what the folder holds; the record is that of `results.json`.

    Args:
        contenders: of the experiment, for the subject.
        on_progress: called after every answer.

    Raises:
        InvalidInput: the folder was made with something else.
    """
    experiment = named(name)
    details = {
        title: {"series": each.series, "at": each.at, "tree": each.tree.to_dict() if each.tree is not None else None}
        for title, each in contenders.items()
    }
    digest = hashlib.sha256(json.dumps(details).encode()).hexdigest()[:16]
    made_with = {"experiment": name, **made_with, "decoders": list(contenders), "trees": digest}
    decoders = {title: each.decoder for title, each in contenders.items()}
    measured = take(exam, decoders, folder, made_with, rounds, on_progress)
    exact = [title for title, each in contenders.items() if each.exact]
    record = {
        "made_with": made_with,
        "rounds": rounds,
        "left_out": [question.id for question in exam.left_out],
        "missing": experiment.missing(subject),
        "contenders": details,
        "decoders": summarise(measured, exam.questions, exact, scorer),
        "paper": dataclasses.asdict(experiment.paper),
    }
    return json.loads(json.dumps(record))  # as it will be read again: tuples are lists


def save(record: dict[str, Any], folder: Path, draw: bool) -> None:
    """Write `results.json`, `results.md` and, where asked for, the experiment's figure as PNG and SVG."""
    experiment = named(record["made_with"]["experiment"])
    write_text(folder / "results.json", json.dumps(record, indent=2) + "\n")
    draw = draw and experiment.axis is not None
    if draw:
        from medusa.evaluation.plots import save_figure

        save_figure(record, experiment, folder)
    write_text(folder / "results.md", markdown(record, "![](figure.svg)" if draw else None))


def markdown(record: dict[str, Any], figure: str | None = None) -> str:
    """The record as a page.

    Args:
        figure: a line that shows the experiment's figure.
    """
    made, found = record["made_with"], record["decoders"]
    experiment = named(made["experiment"])
    first = next(iter(found.values()))
    title = made["experiment"].replace("-", " ").capitalize()
    lines = [
        f"# {title}: {experiment.title[0].lower()}{experiment.title[1:]}",
        "",
        f"{made['model']} on {made['prompts']}: {first[OVERALL]['questions']} questions, at most {made['max_new_tokens']} new "
        f"tokens an answer, {circumstances(record)}",
        "",
        *table(*cells(found, OVERALL, experiment.columns)),
    ]
    categories = [part for part in first if part != OVERALL]
    if len(categories) > 1:
        base = "generate" if GENERATE in found else "plain"
        rows = [[part, *(told(parts[part][f"speedup_vs_{base}"]) for parts in found.values())] for part in categories]
        lines += ["", f"## Speedup over {base}, by category", "", *table(["category", *found], rows)]
    if figure is not None:
        lines += ["", figure]
    if record["missing"]:
        lines += ["", "Rows left out:", "", *(f"- {row}" for row in record["missing"])]
    if record["left_out"]:
        lines += ["", f"Questions left out, their prompts not fitting the context: {', '.join(record['left_out'])}."]
    printed = record["paper"]
    lines += ["", "## In the paper", "", f"{printed['setting']}."]
    if printed["rows"]:
        lines += ["", *table(printed["rows"][0], printed["rows"][1:])]
    if printed["says"]:
        lines += ["", printed["says"]]
    here = made.get("gpu") or f"{made['cpu']}, {made['threads']} threads"
    differs = f"**What differs:** the model ({made['model']}), the prompts ({made['prompts']}) and the machine ({here})"
    if experiment.quality:
        differs += "; quality is likelihood under the original backbone, where the paper asks a judge (`medusa judge`)"
    return "\n".join([*lines, "", f"{differs}."]) + "\n"
