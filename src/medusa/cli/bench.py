"""medusa bench: decoders side by side on published or own prompt sets."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, showing
from medusa.runs.console import note

if TYPE_CHECKING:
    from medusa.evaluation.page import Table

PromptsOption = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="held-out (default for `embedded`), mt-bench, humaneval, or your own: .txt, JSON, JSONL, Parquet, folder, hub id.",
    ),
]
CategoryOption = Annotated[
    list[str] | None, typer.Option("--category", help="Use only questions of this category; repeatable.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Use N questions, spread evenly over the set.")]
RoundsOption = Annotated[
    int, typer.Option("--rounds", min=1, help="Number of times each question is answered; the median time counts.")
]


class DecoderName(StrEnum):
    GENERATE = "generate"
    PLAIN = "plain"
    MEDUSA = "medusa"
    PROMPT_LOOKUP = "prompt-lookup"
    ASSISTED = "assisted"


class AcceptanceName(StrEnum):
    EXACT = "exact"
    TYPICAL = "typical"


def bench_command(
    model: common.ModelArgument = "embedded",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results; an unfinished run there is resumed.")
    ] = Path("bench"),
    prompts: PromptsOption = None,
    references: Annotated[Path | None, typer.Option("--references", help="File of reference answers by question_id.")] = None,
    category: CategoryOption = None,
    limit: LimitOption = None,
    heads: common.HeadsOption = None,
    decoder: Annotated[
        list[DecoderName] | None, typer.Option("--decoder", help="Decoder to measure; repeatable (default: the first three).")
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option("--tree", help="Tree for `medusa`; repeatable (default: the heads' own).")
    ] = None,
    acceptance: Annotated[
        list[AcceptanceName] | None, typer.Option("--acceptance", help="Acceptance for `medusa`; repeatable (default: exact).")
    ] = None,
    epsilon: common.Epsilon = 0.09,
    delta: common.Delta = 0.3,
    draft: Annotated[str | None, typer.Option("--draft", help="Folder or hub id of the draft model for `assisted`.")] = None,
    gamma: Annotated[
        list[int] | None,
        typer.Option("--gamma", min=1, help="Number of tokens in a draft of `assisted`; repeatable (default: 4)."),
    ] = None,
    max_new_tokens: common.MaxNewTokens = 256,
    temperature: common.Temperature = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    rounds: RoundsOption = 1,
    quality: Annotated[
        bool, typer.Option("--quality", help="Add quality: likelihood under the original backbone, variety, compiling code.")
    ] = False,
    quantization: common.QuantizationOption = "none",
    gguf_file: common.GgufOption = None,
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    compile: common.CompileOption = False,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Measure decoders in turn on the same prompts, in one run. If interrupted, run the same command again to resume."""
    from medusa.evaluation.report import SPEED_COLUMNS, figures_table
    from medusa.evaluation.verbs import bench

    lists: dict[str, Any] = {"decoders": decoder, "trees": tree, "acceptances": acceptance, "gammas": gamma}
    found = bench(
        common.with_file(model, gguf_file, revision),
        prompts,
        output,
        heads=heads,
        draft=draft,
        references=references,
        categories=category or (),
        limit=limit,
        dtype=dtype,
        device=device,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        **{name: [value if type(value) is int else str(value) for value in values] for name, values in lists.items() if values},
        epsilon=epsilon,
        delta=delta,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        rounds=rounds,
        quality=quality,
        compile=compile,
    )
    show_figures(found, figures_table(found["decoders"], "overall", SPEED_COLUMNS), as_json)
    note(f"the whole report, by category, and the answers are in {output}")


def show_figures(found: dict[str, Any], table: Table, as_json: bool) -> None:
    """Print a record as JSON, or its table."""
    if as_json:
        print(json.dumps(found))
    else:
        showing.print_table(table.header, table.rows)
