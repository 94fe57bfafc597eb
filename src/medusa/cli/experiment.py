"""medusa experiment: the paper's experiments on any model and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medusa.cli import common
from medusa.cli.bench import PromptsOption, show_figures
from medusa.evaluation.config import ExperimentConfig
from medusa.runs.console import note

ExperimentName = Literal["figure-3", "figure-4", "figure-5", "figure-7", "table-1", "table-3", "table-4"]


@common.with_options(ExperimentConfig, common.Loading)
def experiment_command(
    name: Annotated[ExperimentName, typer.Argument(help="A figure or table of the paper.", show_default=False)],
    model: common.ModelArgument = "embedded",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for results; an unfinished run there is resumed (default: experiments/NAME)."
        ),
    ] = None,
    prompts: PromptsOption = None,
    as_json: common.JsonOption = False,
    **options: Any,
) -> None:
    """Repeat one of the paper's experiments: compare its decoders on the same prompts, and show the paper's figures too.

    If interrupted, run the same command again to resume.
    """
    from medusa.evaluation.experiments import find_experiment
    from medusa.evaluation.report import figures_table
    from medusa.evaluation.verbs import experiment

    model, output = common.full_name(model, options), output or Path("experiments") / name
    found = experiment(name, model, prompts, output, **options)
    show_figures(found, figures_table(found["decoders"], "overall", find_experiment(name).columns), as_json)
    note(f"the paper's figures beside these, and the whole record, are in {output}")
