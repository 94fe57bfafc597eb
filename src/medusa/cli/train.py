"""medusa train: train heads for a backbone, and the backbone with them."""

from __future__ import annotations

import dataclasses
import json
import typing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from typer.core import TyperCommand

from medusa.cli import common, showing
from medusa.runs.console import note
from medusa.training.config import METHOD, TrainingConfig, recipe_names, resolve

if TYPE_CHECKING:
    from medusa.training.verbs import Trained

DataOption = Annotated[
    list[str],
    typer.Option("--data", metavar="DATA", help="JSON, JSONL or Parquet file, folder, or `datasets` id[:split]; repeatable."),
]
ConfigOption = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file of training options; flags override it.")]
EvalDataOption = Annotated[
    list[str] | None, typer.Option(metavar="DATA", help="Evaluation data (default: held-out rows); repeatable.")
]
HeadsOption = Annotated[str | None, typer.Option(metavar="DIR", help="Heads to start from (default: copies of the LM head).")]
HiddenStatesOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder for the original backbone's hidden states, to train from.")
]
METHOD_HELP = f"Recipe that sets the training options below: {', '.join(recipe_names())}."
# The training options in --help, in this order; options in no group go into the last.
GROUPS = {
    "Heads": ("num_heads", "num_layers", "heads_kind", "shared_lm_head", "draft_vocabulary"),
    "Loss of the heads": ("lambda_base", "targets", "soft_top", "loss_chunk"),
    "Data": ("max_length", "packing", "held_out"),
    "Steps": (
        ("epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "warmup_steps", "weight_decay")
        + ("optimizer", "seed")
    ),
    "Backbone, if it is trained with the heads (Medusa-2)": (
        ("backbone", "quantization", "lm_loss", "lambda_0", "lambda_0_schedule", "heads_steps", "backbone_learning_rate")
        + ("lora_rank", "lora_alpha", "lora_dropout", "gradient_checkpointing")
    ),
    "Logs and files": ("logging_steps", "eval_steps", "save_steps", "tree_nodes", "report_to"),
}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}
HINTS = typing.get_type_hints(TrainingConfig)


class COMMAND(TyperCommand):
    """`medusa train`, whose --help ends with the training options and their values for the given method."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined = next((each.partition("=")[2] for each in args if each.startswith("--method=")), None)
        apart = next((after for each, after in pairwise(args) if each == "--method"), None)
        ctx.meta["method"] = joined or apart or METHOD
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        method = ctx.meta.get("method", METHOD)
        print_training_options(method if method in recipe_names() else METHOD)


def print_training_options(method: str) -> None:
    """Print the fields of TrainingConfig with the values that a method gives them."""
    from rich.table import Table
    from rich.text import Text

    values, out = resolve(method, {}), showing.console()
    out.print(
        f" Training options, with their values for {method}; for another method: --method NAME --help. A flag turns `no` into "
        "`yes`, and --no-FLAG turns `yes` into `no`."
    )
    grouped = dict(GROUPS)
    *_, last = grouped
    grouped[last] += tuple(name for name in FIELDS if not any(name in names for names in GROUPS.values()))
    flag_width = 2 + max(map(len, FIELDS))
    for title, names in grouped.items():
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=flag_width, no_wrap=True, style="cyan")
        grid.add_column(width=8, overflow="fold", style="bold")
        grid.add_column()
        for name in names:
            choices = typing.get_args(HINTS[name]) if typing.get_origin(HINTS[name]) is typing.Literal else ()
            shown = f"{'|'.join(choices)}: " if choices else ""
            flag = f"--{name.replace('_', '-')}"
            value = getattr(values, name)
            words = {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else f"{value}"
            grid.add_row(flag, f"{value:g}" if isinstance(value, float) else words, Text(shown + FIELDS[name].metadata["help"]))
        out.print(Text(f"\n {title}", style="dim"))
        out.print(Padding(grid, (0, 0, 0, 1)))
    out.print()


@common.with_options(TrainingConfig, unset=True)  # shown by print_training_options
@common.with_options(common.Loading)
def train_command(
    model: common.ModelArgument,
    data: DataOption,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results.")] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help=METHOD_HELP)] = METHOD,
    config: ConfigOption = None,
    eval_data: EvalDataOption = None,
    heads: HeadsOption = None,
    hidden_states: HiddenStatesOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in the output folder.")] = False,
    preview: Annotated[int, typer.Option(metavar="N", min=0, help="Only show N rows, with labelled tokens in colour.")] = 0,
    as_json: common.JsonOption = False,
    **options: Any,
) -> None:
    """Train Medusa heads, and with --method medusa-2 the backbone too (paper 2.2). Also runs under `accelerate launch`."""
    from medusa.training.run import is_main_process
    from medusa.training.verbs import train

    model = common.full_name(model, options)
    options |= {"method": method, "config": config}
    if preview:
        rest = {name: value for name, value in options.items() if name not in ("dtype", "device")}
        show_rows(preview, model, data, **rest)
        return
    if output is None:
        raise typer.BadParameter("no folder for the results; pass --output DIR", param_hint="--output")
    options |= {"eval_data": eval_data, "heads": heads, "hidden_states": hidden_states, "resume": resume}
    try:
        trained = train(model, data, output, **options)
    except KeyboardInterrupt:
        note("interrupted; run the same command with --resume to continue from the newest checkpoint, if there is one")
        raise typer.Exit(130) from None
    if is_main_process():
        _show(trained, as_json)


def _show(trained: Trained, as_json: bool) -> None:
    """Print the accuracies of the heads and the expected acceleration rate."""
    metrics, recipe = trained.metrics, trained.config
    if as_json:
        print(json.dumps({"output": str(trained.output), "metrics": metrics}))
        return
    note(f"heads, tree and model card saved in {trained.output}; medusa tune fits the tree to this machine")
    for k in range(1, recipe.num_heads + 1):
        if f"eval_head{k}_top1" in metrics:
            tops = "  ".join(f"top-{i} {metrics[f'eval_head{k}_top{i}']:.3f}" for i in (1, 2, 3, 5))
            print(f"head {k}: {tops}")
    if "eval_acceleration_rate" in metrics:
        print(f"expected acceleration rate: {metrics['eval_acceleration_rate']:.2f} tokens per step, {recipe.tree_nodes} nodes")


def show_rows(count: int, model: str, data: list[str], **options: Any) -> None:
    """Print the first rows as the model will see them (see `training_rows`), with the labelled tokens in colour, the others
    dim."""
    from itertools import islice

    from rich.console import Console
    from rich.text import Text

    from medusa.training.data import masked_runs
    from medusa.training.verbs import note_rows, training_rows

    rows, tokenizer = training_rows(model, data, **options)
    console = Console()
    for number, row in enumerate(islice(rows, count), 1):
        text = Text()
        for learned, ids in masked_runs(row):
            text.append(tokenizer.decode(ids), style="bold green" if learned else "dim")
        console.rule(f"row {number} of {len(rows)}: {len(row)} tokens, {int(row.loss_mask.sum())} learnt ({row.source})")
        console.print(text)
    note_rows(rows)
