"""medusa distill: the model writes its own training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medusa.cli import common
from medusa.errors import InvalidInput
from medusa.runs.console import note


def distill_command(
    model: common.ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Prompts: .txt, JSON, JSONL, Parquet, folder, `datasets` id[:split]; or `self`: the model writes them.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of JSONL shards; an unfinished run there is resumed.")],
    heads: common.HeadsOption = None,
    tree: common.TreeOption = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="Address of an OpenAI-compatible server, which knows the model as MODEL.")
    ] = None,
    api_key_env: common.EndpointKeyOption = "OPENAI_API_KEY",
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="Temperature of the sampling; 0 is greedy.")] = 0.3,
    top_p: common.TopP = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum number of tokens per answer.")] = 512,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Number of tokens to keep of a plain text, for the model to continue.")
    ] = 128,
    self_talk: Annotated[
        int, typer.Option("--self-talk", min=0, help="Number of further rounds in which the model writes the user's turns too.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Number of conversations decoded, or requests sent, at a time.")
    ] = 16,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Number of conversations to make with --data self.")] = 1000,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first N prompts.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    ray: Annotated[int, typer.Option("--ray", min=0, help="Run on N workers as a Ray Data job.")] = 0,
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
    """Have the model answer prompts, as training data for its heads (paper 2.3.2). If interrupted, run it again to resume."""
    from medusa.training.verbs import distill

    done = distill(
        common.with_file(model, gguf_file, revision),
        data,
        output,
        heads=heads,
        tree=tree,
        endpoint=endpoint,
        api_key_env=api_key_env,
        samples=samples,
        limit=limit,
        ray=ray,
        quantization=quantization,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        prompt_tokens=prompt_tokens,
        self_talk=self_talk,
        batch_size=batch_size,
        seed=seed,
        compile=compile,
    )
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
