"""medusa distill: the model writes its own training data."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common
from medusa.errors import InvalidInput

if TYPE_CHECKING:
    from medusa.model import MedusaModel


def distill_command(
    model: common.ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Prompts: .txt, JSON, JSONL, Parquet, folder, `datasets` id[:split]; `self`: the model writes them.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of JSONL shards; a run there is gone on with.")],
    heads: common.HeadsOption = None,
    tree: common.TreeOption = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="Ask this OpenAI-compatible address; MODEL is its name there.")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", help="Environment variable with the endpoint's key.")
    ] = "OPENAI_API_KEY",
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.3,
    top_p: common.TopP = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Of one answer.")] = 512,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Of a plain text, before the model goes on.")] = 128,
    self_talk: Annotated[int, typer.Option("--self-talk", help="Further rounds in which the model asks itself.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Conversations at a time, or requests under way.")] = 16,
    samples: Annotated[int, typer.Option("--samples", help="Number of conversations, with --data self.")] = 1000,
    limit: Annotated[int | None, typer.Option("--limit", help="Use the first so many seeds.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    ray: Annotated[int, typer.Option("--ray", help="Run on so many workers as a Ray Data job.")] = 0,
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
    """Answer seed prompts with the model itself, for `medusa train` (paper 2.3.2). Killed, it goes on where it was."""
    model = common.with_file(model, gguf_file, revision)
    common.quiet_transformers()
    from medusa.data.endpoint import Endpoint
    from medusa.data.samples import Skips
    from medusa.training.distillation import (
        Answerer,
        Distillation,
        EndpointAnswerer,
        ModelAnswerer,
        Shards,
        answer_seeds,
        read_seeds,
    )
    from medusa.training.questions import write_questions

    if samples < 1 or (limit is not None and limit < 1) or ray < 0:
        raise InvalidInput(f"--samples is {samples}, --limit {limit}, --ray {ray}: wanted at least 1, and 0 for --ray")
    options = Distillation(temperature, top_p, max_new_tokens, prompt_tokens, self_talk, batch_size, compile, seed)
    made_by = {"model": model, "heads": heads, "endpoint": endpoint, **dataclasses.asdict(options)}
    for name in ("batch_size", "compile"):  # of how, not of what
        del made_by[name]

    Shards.refuse_other(output, made_by)

    def loaded() -> tuple[MedusaModel, Any]:
        medusa = common.load_model(model, heads, tree, dtype, device, trust_remote_code, quantization, heads_wanted=False)
        common.note_tree(medusa, model, heads, tree)
        return medusa, common.load_tokenizer(model, trust_remote_code)

    def answerer() -> Answerer:
        if endpoint is not None:
            return EndpointAnswerer(Endpoint(endpoint, model, os.environ.get(api_key_env)), options)
        return ModelAnswerer(*loaded(), options)

    skips = Skips()
    if data == "self":
        if endpoint is not None or ray:
            raise InvalidInput("--data self runs here, on one machine; drop --endpoint and --ray")
        made = ModelAnswerer(*loaded(), options)
        shards = Shards(output, made_by)
        questions = write_questions(made.model, made.tokenizer, output, samples, batch_size, seed, compile)
        seeds = read_seeds(questions, skips)[:samples]
        done = answer_seeds(seeds, made, shards)
    else:
        seeds = read_seeds(data, skips)[:limit]
        if not seeds:
            raise InvalidInput(f"{data} holds no prompts: {skips or 'it is empty'}")
        if ray:
            from medusa.training.ray import RayAnswerer

            made_of: Answerer = RayAnswerer(answerer, ray, batch_size)
        else:
            made_of = answerer()
        done = answer_seeds(seeds, made_of, Shards(output, made_by))  # claimed only now: a run that cannot load leaves nothing
    if skips:
        common.note(f"skipped {skips}")
    for reason, number in done.failed.most_common():
        common.note(f"{number} samples failed: {reason}")
    if as_json:
        record = {"output": str(output), "made": done.made, "already": done.already, "failed": dict(done.failed)}
        print(json.dumps(record | {"skipped": dict(skips.reasons), "tokens": done.tokens, "seconds": done.seconds}))
    else:
        rate = f", {done.tokens / done.seconds:.0f} tokens/s" if done.tokens else ""
        print(f"{done.made} samples made, {done.already} there already, in {output}{rate}")
    if done.failed:
        raise InvalidInput(f"{done.failed.total()} samples failed; the same command tries them again")
