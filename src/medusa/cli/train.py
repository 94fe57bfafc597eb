"""medusa train: train heads for a backbone, and the backbone with them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import typing
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.padding import Padding
from typer.core import TyperCommand

from medusa.cli import common
from medusa.errors import InvalidInput
from medusa.training.config import TrainingConfig, read_options, recipe_names, resolve

METHOD = "medusa-1"
METHOD_HELP = f"{', '.join(recipe_names())}: what sets the options further down."
# The training options in --help, in this order; what is in no group is in the last.
GROUPS = {
    "Heads": ("num_heads", "num_layers", "shared_lm_head", "draft_vocabulary"),
    "Their loss": ("lambda_base", "targets", "soft_top", "loss_chunk"),
    "Data": ("max_length", "packing", "held_out"),
    "Steps": (
        ("epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "warmup_steps", "weight_decay")
        + ("optimizer", "seed")
    ),
    "A backbone that is trained with them (Medusa-2)": (
        ("backbone", "quantization", "lm_loss", "lambda_0", "lambda_0_schedule", "heads_steps", "backbone_learning_rate")
        + ("lora_rank", "lora_alpha", "lora_dropout", "gradient_checkpointing")
    ),
    "What is said and kept": ("logging_steps", "eval_steps", "save_steps", "tree_nodes", "report_to"),
}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}
HINTS = typing.get_type_hints(TrainingConfig)


class COMMAND(TyperCommand):
    """`medusa train`, whose --help ends with the training options as the method named beside it sets them, a line each."""

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
    """The options of TrainingConfig with the values that a method gives them."""
    from rich.table import Table
    from rich.text import Text

    from medusa.cli import showing

    values, out = resolve(method, {}), showing.console()
    out.print(
        f" Training options, with the values of {method}; for those of another: --method NAME --help. What is `no` becomes "
        "yes by its flag, what is yes no by --no-FLAG."
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
            grid.add_row(flag_of(name), _shown(getattr(values, name)), Text(shown + FIELDS[name].metadata["help"]))
        out.print(Text(f"\n {title}", style="dim"))
        out.print(Padding(grid, (0, 0, 0, 1)))
    out.print()


def flag_of(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else "no" if value is False else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for each field of TrainingConfig; those the user sets arrive as the dict `options`."""
    parameters = []
    for name, kind in HINTS.items():
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        flag = f"{flag_of(name)}/--no-{name.replace('_', '-')}" if kind is bool else flag_of(name)
        plain: Any = str if choices else (float if kind == (float | None) else kind)
        option = typer.Option(flag, help=FIELDS[name].metadata["help"], hidden=True)  # shown by print_training_options
        annotation = Annotated[plain | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        options = {parameter.name: arguments.pop(parameter.name) for parameter in parameters}
        command(**arguments, options={name: value for name, value in options.items() if value is not None})

    own = inspect.signature(command, eval_str=True)
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values() if p.name != "options"]
    wrapped.__signature__ = own.replace(parameters=kept + parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in kept + parameters}
    del wrapped.__wrapped__  # type: ignore[attr-defined]
    return wrapped


@with_training_options
def train_command(
    options: dict[str, Any],
    model: common.ModelArgument,
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="DATA", help="JSON, JSONL or Parquet file, folder, or `datasets` id[:split]; repeatable."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for all that comes of it.")
    ] = None,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help=METHOD_HELP)] = METHOD,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML of training options; flags win.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", metavar="DATA", help="Data to measure on (default: some is held out).")
    ] = None,
    heads: Annotated[
        str | None, typer.Option("--heads", metavar="DIR", help="Heads to start from (default: copies of the LM head).")
    ] = None,
    hidden_states: Annotated[
        Path | None,
        typer.Option("--hidden-states", metavar="DIR", help="Keep the backbone's hidden states here and train from them."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output folder.")] = False,
    preview: Annotated[
        int, typer.Option("--preview", metavar="N", min=0, help="Show so many samples, what is learnt coloured; no training.")
    ] = 0,
    gguf_file: common.GgufOption = None,
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Train Medusa heads, and with medusa-2 the backbone too (paper 2.2). Runs under `accelerate launch` as well."""
    model = common.with_file(model, gguf_file, revision)
    if output is None and not preview:
        raise typer.BadParameter("say where to: --output DIR", param_hint="--output")
    settings = (read_options(config) if config else {}) | options
    recipe = resolve(method, settings, str(config) if config else "training options")

    common.quiet_transformers()
    from medusa.backbone.lm import max_length_of
    from medusa.checkpoints.hub import find_heads, find_model
    from medusa.checkpoints.loading import load_backbone, load_config
    from medusa.checkpoints.quantization import quantized
    from medusa.checkpoints.reader import has_heads, load_heads
    from medusa.data.samples import Skips, read_samples
    from medusa.model import MedusaModel
    from medusa.training.data import load_rows
    from medusa.training.run import FEWEST_TO_HOLD_OUT_OF, number_to_hold_out, refuse_begun, train

    # What needs no model to be known.
    if output is not None and not preview:
        refuse_begun(output, resume)
    for each in [*data, *([eval_data] if eval_data else [])]:
        next(read_samples(each, Skips()), None)
    if heads is not None and not has_heads(find_heads(heads)):
        raise InvalidInput(f"{heads} has no Medusa heads to start from; drop --heads, or give a folder of some")
    tokenizer = common.load_tokenizer(model, trust_remote_code)
    source = find_model(model, code=trust_remote_code)
    if preview:
        sizes = load_config(source, trust_remote_code=trust_remote_code)
        length = min(recipe.max_length, max_length_of(sizes) or recipe.max_length)
        _preview(data, tokenizer, recipe, preview, length, sizes.vocab_size)
        return
    assert output is not None
    backbone = load_backbone(
        source,
        dtype=common.dtype_named(dtype),
        device_map=common.default_device(device),
        trust_remote_code=trust_remote_code,
        **quantized(recipe.quantization, common.dtype_named(dtype)),
    )
    medusa = MedusaModel(backbone, load_heads(find_heads(heads)) if heads else None)
    length = min(recipe.max_length, medusa.max_length or recipe.max_length)
    main = os.environ.get("RANK", "0") == "0"  # of several processes, one speaks
    rows = load_rows(data, tokenizer, length, medusa.vocab_size, recipe.packing, progress=main)
    eval_rows = load_rows(eval_data, tokenizer, length, medusa.vocab_size) if eval_data else None
    if main:
        _describe(rows, length)
        if eval_rows is None and not number_to_hold_out(rows, recipe.held_out):
            why = (
                "none are held out"
                if not recipe.held_out
                else f"fewer than {FEWEST_TO_HOLD_OUT_OF} rows are too few to hold any out"
            )
            common.note(f"{why}: the heads are measured on rows they learn, which flatters them; better give --eval-data")
    metrics = train(medusa, rows, output, recipe, eval_rows, resume, hidden_states)
    if not main:
        return
    if recipe.backbone == "full":
        tokenizer.save_pretrained(output)
    if as_json:
        print(json.dumps({"output": str(output), "metrics": metrics}))
        return
    common.note(f"heads, tree and model card saved in {output}; medusa tune fits the tree to this machine")
    for k in range(1, recipe.num_heads + 1):
        if f"eval_head{k}_top1" in metrics:
            tops = "  ".join(f"top-{i} {metrics[f'eval_head{k}_top{i}']:.3f}" for i in (1, 2, 3, 5))
            print(f"head {k}: {tops}")
    if "eval_acceleration_rate" in metrics:
        print(f"expected acceleration rate: {metrics['eval_acceleration_rate']:.2f} tokens a step, {recipe.tree_nodes} nodes")


def _describe(rows: Any, length: int) -> None:
    common.note(f"{len(rows)} rows, {rows.tokens:,} tokens, {rows.labelled:,} of them to be learnt")
    if rows.cut:
        common.note(f"{rows.cut} samples were longer than {length} tokens and were cut")
    if rows.skips:
        common.note(f"skipped {rows.skips}")


def _preview(data: list[str], tokenizer: Any, recipe: TrainingConfig, count: int, length: int, vocab_size: int) -> None:
    """Samples as the model will see them: what is learnt in colour, the rest dim."""
    from itertools import islice

    from rich.console import Console
    from rich.text import Text

    from medusa.training.data import load_rows, spoken_runs

    rows = load_rows(data, tokenizer, length, vocab_size, recipe.packing)
    console = Console()
    for number, row in enumerate(islice(rows, count), 1):
        text = Text()
        for spoken, ids in spoken_runs(row):
            text.append(tokenizer.decode(ids), style="bold green" if spoken else "dim")
        console.rule(f"row {number} of {len(rows)}: {len(row)} tokens, {int(row.spoken.sum())} learnt ({row.source})")
        console.print(text)
    _describe(rows, length)
