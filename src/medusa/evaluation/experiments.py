"""Experiments as records and as pages: measured figures beside the paper's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from medusa.data.prompt_sets import OVERALL
from medusa.errors import InvalidInput
from medusa.evaluation.answers import PromptSet, measure_entries
from medusa.evaluation.catalog import EXPERIMENTS, Experiment, Setup
from medusa.evaluation.page import Block, Page, Plot, Table
from medusa.evaluation.quality import Scorer
from medusa.evaluation.report import GENERATE, circumstances, figures_table, interval_text, save_report, shown_categories
from medusa.runs.files import digest
from medusa.runs.plotting import PLOT_SUFFIXES, can_plot, save_plot, svg_of


def find_experiment(name: str) -> Experiment:
    """An experiment by name; InvalidInput if there is none."""
    if name not in EXPERIMENTS:
        raise InvalidInput(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def measure_experiment(
    name: str,
    setup: Setup,
    prompt_set: PromptSet,
    scorer: Scorer | None,
    folder: Path,
    made_with: dict[str, Any],
    rounds: int = 1,
) -> dict[str, Any]:
    """Measure the entries of an experiment; see `measure_entries`."""
    experiment = find_experiment(name)
    entries = experiment.entries(setup)
    described = {
        title: {"series": each.series, "at": each.at, "tree": each.tree.to_dict() if each.tree is not None else None}
        for title, each in entries.items()
    }
    made_with = {"experiment": name, **made_with, "decoders": list(entries), "trees": digest(described)}
    more = {"missing": experiment.missing(setup), "entries": described, "paper": dataclasses.asdict(experiment.paper)}
    return measure_entries(entries, prompt_set, folder, made_with, rounds, scorer) | json.loads(json.dumps(more))


def save_experiment(record: dict[str, Any], folder: Path) -> None:
    """Write `results.json`, `results.md`, `results.html` and, with matplotlib, the experiment's figure as PNG and SVG."""
    experiment = find_experiment(record["made_with"]["experiment"])
    plot = None
    if experiment.axis is not None and can_plot():
        from medusa.evaluation.plots import experiment_figure

        figure = experiment_figure(record, experiment)
        for suffix in PLOT_SUFFIXES:
            save_plot(figure, folder / f"figure{suffix}")
        plot = Plot(svg_of(figure), "figure.svg")
    save_report(record, experiment_page(record, plot), folder)


def experiment_page(record: dict[str, Any], plot: Plot | None = None) -> Page:
    """The page of an experiment: what was measured here, then what the paper prints, then what differs."""
    made, found = record["made_with"], record["decoders"]
    experiment = find_experiment(made["experiment"])
    questions = next(iter(found.values()))[OVERALL]["questions"]
    blocks: list[Block] = [
        f"{made['model']} on {made['prompts']}: {questions} questions, at most {made['max_new_tokens']} new "
        f"tokens per answer, {circumstances(record)}",
        figures_table(found, OVERALL, experiment.columns),
    ]
    if categories := shown_categories(found)[1:]:
        base = "generate" if GENERATE in found else "plain"
        rows = [[part, *(interval_text(each[part][f"speedup_vs_{base}"]) for each in found.values())] for part in categories]
        blocks += [f"## Speedup over {base}, by category", Table(["category", *found], rows)]
    if plot is not None:
        blocks.append(plot)
    if record["missing"]:
        blocks += ["Rows left out:", "\n".join(f"- {row}" for row in record["missing"])]
    if record["left_out"]:
        blocks.append(f"Questions left out, since their prompts do not fit the context: {', '.join(record['left_out'])}.")
    blocks += _beside(record["paper"], experiment, made)
    title = made["experiment"].replace("-", " ").capitalize()
    return Page(f"{title}: {experiment.title[0].lower()}{experiment.title[1:]}", blocks, {**made, "rounds": record["rounds"]})


def _beside(printed: dict[str, Any], experiment: Experiment, made: dict[str, Any]) -> list[Block]:
    """What the paper prints, and how its experiment differs."""
    blocks: list[Block] = ["## In the paper", f"{printed['setting']}."]
    if printed["rows"]:
        blocks.append(Table(printed["rows"][0], printed["rows"][1:]))
    if printed["says"]:
        blocks.append(printed["says"])
    here = made.get("gpu") or f"{made['cpu']}, {made['threads']} threads"
    differs = f"**What differs:** the model ({made['model']}), the prompts ({made['prompts']}) and the machine ({here})"
    if experiment.quality:
        differs += "; quality is likelihood under the original backbone, while the paper has a judge (`medusa judge`)"
    return [*blocks, f"{differs}."]
