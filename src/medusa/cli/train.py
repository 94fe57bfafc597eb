"""medusa train: train heads for a backbone, and the backbone with them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa.cli import common
from medusa.training.config import TrainingConfig, read_options, recipe_names, resolve

METHOD_HELP = f"Recipe to begin with: {', '.join(recipe_names())}."


def with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for each field of TrainingConfig; those the user sets arrive as the dict `options`."""
    hints = typing.get_type_hints(TrainingConfig)
    parameters = []
    for field in dataclasses.fields(TrainingConfig):
        kind = hints[field.name]
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        flag = f"--{field.name.replace('_', '-')}"
        default = "" if field.default is None else f" (default: {field.default}, if the method does not say otherwise)"
        shown = f"{'|'.join(choices)}: " if choices else ""
        if kind is bool:
            flag = f"{flag}/--no-{field.name.replace('_', '-')}"
        option = typer.Option(flag, help=f"{shown}{field.metadata['help']}{default}", show_default=False)
        plain: Any = str if choices else (float if kind == (float | None) else kind)
        annotation = Annotated[plain | None, option]
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

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
            "--data", help="JSON, JSONL or Parquet file, folder, or `datasets` id[:split]; may be given several times."
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for all that comes of it.")] = None,
    method: Annotated[str, typer.Option("--method", help=METHOD_HELP)] = "medusa-1",
    config: Annotated[Path | None, typer.Option("--config", help="YAML of the options below; flags win over it.")] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Data to measure on (default: some is held out).")
    ] = None,
    heads: Annotated[str | None, typer.Option("--heads", help="Heads to start from (default: copies of the LM head).")] = None,
    hidden_states: Annotated[
        Path | None, typer.Option("--hidden-states", help="Keep the backbone's hidden states here and train from them.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output folder.")] = False,
    preview: Annotated[
        int, typer.Option("--preview", min=0, help="Show this many samples, what is learnt coloured; no training.")
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
    from medusa.backbone import context_of
    from medusa.checkpoints import load_heads
    from medusa.hub import find_heads, find_model
    from medusa.loading import load_backbone, load_config
    from medusa.model import MedusaModel
    from medusa.quantization import quantized
    from medusa.training.data import load_rows
    from medusa.training.run import train

    tokenizer = common.load_tokenizer(model, trust_remote_code)
    source = find_model(model, code=trust_remote_code)
    if preview:
        sizes = load_config(source, trust_remote_code=trust_remote_code)
        length = min(recipe.max_length, context_of(sizes) or recipe.max_length)
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
    length = min(recipe.max_length, medusa.context or recipe.max_length)
    main = os.environ.get("RANK", "0") == "0"  # of several processes, one speaks
    rows = load_rows(data, tokenizer, length, medusa.vocab_size, recipe.packing, progress=main)
    eval_rows = load_rows(eval_data, tokenizer, length, medusa.vocab_size) if eval_data else None
    if main:
        _describe(rows, length)
    metrics = train(medusa, rows, output, recipe, eval_rows, resume, hidden_states)
    if not main:
        return
    if recipe.backbone == "full":
        tokenizer.save_pretrained(output)
    if as_json:
        print(json.dumps({"output": str(output), "metrics": metrics}))
        return
    common.note(f"heads saved in {output}")
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
