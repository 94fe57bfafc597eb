"""medusa train: train heads for a backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medusa.cli import common
from medusa.errors import InvalidInput


def train_command(
    model: common.ModelArgument,
    data: Annotated[Path, typer.Option("--data", help='JSONL with "text" or "input_ids" on each line.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for heads, checkpoints and the record.")],
    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="Held-out JSONL to measure the heads on.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML of the same options; flags win over it.")] = None,
    heads: Annotated[str | None, typer.Option("--heads", help="Heads to start from [default: copies of the LM head].")] = None,
    num_heads: Annotated[int | None, typer.Option("--num-heads", help="K [default: 5].")] = None,
    num_layers: Annotated[int | None, typer.Option("--num-layers", help="Residual blocks a head [default: 1].")] = None,
    shared_lm_head: Annotated[
        bool | None, typer.Option("--shared-lm-head/--own-lm-heads", help="Predict through the backbone's LM head.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help="soft (the backbone's distribution) or hard [default: soft].")
    ] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Optimiser steps; wins over --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data [default: 2].")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="[default: 8]")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option("--gradient-accumulation", help="[default: 1]")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Peak [default: 2e-3].")] = None,
    warmup_steps: Annotated[int | None, typer.Option("--warmup-steps", help="[default: 40]")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens a block [default: 2048].")] = None,
    save_steps: Annotated[int | None, typer.Option("--save-steps", help="Steps between checkpoints [default: 500].")] = None,
    eval_steps: Annotated[
        int | None, typer.Option("--eval-steps", help="Steps between evaluations [default: at the end].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="[default: 0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output folder.")] = False,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Train Medusa-1 heads on a frozen backbone (paper 2.2.1)."""
    settings = _read_yaml(config)
    flags = {
        "num_heads": num_heads,
        "num_layers": num_layers,
        "shared_lm_head": shared_lm_head,
        "targets": targets,
        "max_steps": max_steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "max_length": max_length,
        "save_steps": save_steps,
        "eval_steps": eval_steps,
        "seed": seed,
    }
    settings |= {key: value for key, value in flags.items() if value is not None}
    for path in (data, eval_data):
        if path is not None and not path.is_file():
            raise InvalidInput(f"no data file {path}")

    common.quiet_transformers()
    from medusa.config import from_mapping
    from medusa.heads import load_heads
    from medusa.hub import local_folder
    from medusa.model import MedusaModel, load_backbone
    from medusa.training.trainer import TrainingConfig, train

    recipe = from_mapping(TrainingConfig, settings, str(config) if config else "training options")
    tokenizer = common.load_tokenizer(model, trust_remote_code)
    backbone = load_backbone(
        local_folder(common.model_folder(model)),
        dtype=common.dtype_named(dtype),
        device_map=common.default_device(device),
        trust_remote_code=trust_remote_code,
    )
    start = load_heads(local_folder(heads)) if heads else None
    metrics = train(MedusaModel(backbone, start), tokenizer, data, output, recipe, eval_data, resume)
    if as_json:
        print(json.dumps({"output": str(output), "metrics": metrics}))
        return
    common.note(f"heads saved in {output}")
    for k in range(1, recipe.num_heads + 1):
        if f"eval_head{k}_top1" in metrics:
            tops = "  ".join(f"top-{i} {metrics[f'eval_head{k}_top{i}']:.3f}" for i in (1, 2, 3, 5))
            print(f"head {k}: {tops}")


def _read_yaml(path: Path | None) -> dict:
    if path is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds a {type(found).__name__}, wanted `option: value` lines")
    return found
