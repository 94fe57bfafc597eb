"""medusa bench: decoders side by side on published or own prompt sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, showing
from medusa.evaluation.config import BenchConfig
from medusa.runs.console import note

if TYPE_CHECKING:
    from medusa.evaluation.page import Table

PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="held-out (default for `embedded`), mt-bench, humaneval, or your own: .txt, JSON, JSONL, Parquet, folder, hub id."
    ),
]


@common.with_options(BenchConfig, common.Loading)
def bench_command(
    model: common.ModelArgument = "embedded",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results; an unfinished run there is resumed.")
    ] = Path("bench"),
    prompts: PromptsOption = None,
    quantization: common.QuantizationOption = "none",
    as_json: common.JsonOption = False,
    **options: Any,
) -> None:
    """Measure decoders in turn on the same prompts, in one run. If interrupted, run the same command again to resume."""
    from medusa.evaluation.report import SPEED_COLUMNS, figures_table
    from medusa.evaluation.verbs import bench

    model = common.full_name(model, options)
    found = bench(model, prompts, output, quantization=quantization, **options)
    show_figures(found, figures_table(found["decoders"], "overall", SPEED_COLUMNS), as_json)
    note(f"the whole report, by category, and the answers are in {output}")


def show_figures(found: dict[str, Any], table: Table, as_json: bool) -> None:
    """Print a record as JSON, or its table."""
    if as_json:
        print(json.dumps(found))
    else:
        showing.print_table(table.header, table.rows)
