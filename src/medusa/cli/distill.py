"""medusa distill: the model writes its own training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa.cli import common
from medusa.errors import InvalidInput
from medusa.runs.console import note
from medusa.training.distillation import Distillation

DataOption = Annotated[
    str,
    typer.Option(help="Prompts: .txt, JSON, JSONL, Parquet, folder, `datasets` id[:split]; or `self`: the model writes them."),
]
EndpointOption = Annotated[
    list[str] | None,
    typer.Option(help="Address of an OpenAI-compatible server that serves the model as MODEL; repeatable, to share the work."),
]


@common.with_options(Distillation, common.Loading)
def distill_command(
    model: common.ModelArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of JSONL shards; an unfinished run there is resumed.")],
    tree: common.TreeOption = None,
    endpoint: EndpointOption = None,
    api_key_env: common.EndpointKeyOption = "OPENAI_API_KEY",
    samples: Annotated[int, typer.Option(min=1, help="Number of conversations to make with --data self.")] = 1000,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts.")] = None,
    ray: Annotated[int, typer.Option(min=0, help="Run on N workers as a Ray Data job.")] = 0,
    quantization: common.QuantizationOption = "none",
    as_json: common.JsonOption = False,
    **options: Any,
) -> None:
    """Have the model answer prompts, as training data for its heads (paper 2.3.2). If interrupted, run it again to resume."""
    from medusa.training.verbs import distill

    model = common.full_name(model, options)
    options |= {"tree": tree, "endpoint": endpoint or None, "api_key_env": api_key_env, "quantization": quantization}
    done = distill(model, data, output, samples=samples, limit=limit, ray=ray, **options)
    if done.skips:
        note(f"skipped {done.skips}")
    for reason, number in done.failed.most_common():
        note(f"{number} samples failed: {reason}")
    if as_json:
        print(json.dumps(done.to_dict()))
    else:
        rate = f", {done.tokens / done.seconds:.0f} tokens/s" if done.tokens else ""
        print(f"{done.made} samples made, {done.already} there already, in {output}{rate}")
    if done.failed:
        raise InvalidInput(f"{done.failed.total()} samples failed; the same command tries them again")
