"""medusa experiment: the paper's experiments on any model and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medusa.cli import common
from medusa.cli.bench import CategoryOption, LimitOption, PromptsOption, RoundsOption, show_figures
from medusa.runs.console import note

ExperimentName = Literal["figure-3", "figure-4", "figure-5", "figure-7", "table-1", "table-3", "table-4"]


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
    category: CategoryOption = None,
    limit: LimitOption = None,
    heads: common.HeadsOption = None,
    medusa_2: Annotated[
        str | None, typer.Option("--medusa-2", help="Medusa-2 heads, with the adapter that was trained together with them.")
    ] = None,
    draft: Annotated[
        list[str] | None, typer.Option("--draft", help="Folder or hub id of a draft model; repeatable (table-1, figure-7).")
    ] = None,
    gamma: Annotated[
        list[int] | None, typer.Option("--gamma", min=1, help="Number of tokens in a draft; repeatable (table-1, figure-7).")
    ] = None,
    nodes: Annotated[
        list[int] | None,
        typer.Option("--nodes", min=2, help="Tree size, the root included; repeatable for figure-4, a single one for table-3."),
    ] = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option("--epsilon", min=0, max=1, help="Hard threshold for figure-5; repeatable (default: 0.01 to 0.25)."),
    ] = None,
    calibration_prompts: Annotated[
        str | None,
        typer.Option(
            "--calibration-prompts",
            help="Prompts to search trees on, other than --prompts: a set, file or hub id (default for `embedded`: its own).",
        ),
    ] = None,
    max_new_tokens: common.MaxNewTokens = 128,
    rounds: RoundsOption = 1,
    gguf_file: common.GgufOption = None,
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    compile: common.CompileOption = False,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Repeat one of the paper's experiments: compare its decoders on the same prompts, and show the paper's figures too.

    If interrupted, run the same command again to resume.
    """
    from medusa.evaluation.experiments import find_experiment
    from medusa.evaluation.report import figures_table
    from medusa.evaluation.verbs import experiment

    lists: dict[str, Any] = {"drafts": draft, "gammas": gamma, "nodes": nodes, "epsilons": epsilon}
    output = output or Path("experiments") / name
    found = experiment(
        name,
        common.with_file(model, gguf_file, revision),
        prompts,
        output,
        heads=heads,
        categories=category or (),
        limit=limit,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        **{option: values for option, values in lists.items() if values},
        medusa_2=medusa_2,
        calibration_prompts=calibration_prompts,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        compile=compile,
    )
    show_figures(found, figures_table(found["decoders"], "overall", find_experiment(name).columns), as_json)
    note(f"the paper's figures beside these, and the whole record, are in {output}")
