"""`medusa.train` and `medusa.distill`: the commands of these names as functions, from models by name to a folder of results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from medusa.backbone.lm import max_length_of
from medusa.checkpoints import named
from medusa.checkpoints.hub import find_heads, find_model
from medusa.checkpoints.loading import load_config
from medusa.checkpoints.reader import has_heads, load_heads
from medusa.config import from_mapping
from medusa.data.endpoint import Endpoint
from medusa.data.samples import Skips, read_samples
from medusa.errors import InvalidInput
from medusa.model import MedusaModel
from medusa.runs.console import note
from medusa.training.answerers import EndpointAnswerer, ModelAnswerer
from medusa.training.config import METHOD, TrainingConfig, read_options, resolve
from medusa.training.data import Data, Rows, load_rows, sources_of
from medusa.training.distillation import Answerer, Distillation, Distilled, Shards, answer_seeds, read_seeds
from medusa.training.questions import check_template, write_questions
from medusa.training.ray import RayAnswerer
from medusa.training.run import FEWEST_TO_HOLD_OUT_OF, is_main_process, number_to_hold_out, refuse_begun, train_heads


@dataclass(frozen=True)
class Trained:
    """The result of a training run."""

    output: Path  # the folder of heads, tree, model card and `training.json`
    config: TrainingConfig
    metrics: dict[str, float]  # as evaluated at the end: `eval_head1_top1`, `eval_acceleration_rate`, …


def train(
    model: str,
    data: Data,
    output: str | Path,
    *,
    method: str = METHOD,
    config: str | Path | None = None,
    eval_data: Data | None = None,
    heads: str | None = None,
    hidden_states: str | Path | None = None,
    resume: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> Trained:
    """Train Medusa heads, and with method `medusa-2` the backbone too (paper 2.2); save all in `output`.

        trained = medusa.train("smollm2", data=["chats.jsonl"], output="heads", shared_lm_head=True)
        model = MedusaModel.from_pretrained("smollm2", heads="heads")

    Notes and progress go to stderr. For a loaded backbone and rows there is `medusa.training.run.train_heads`.

    Args:
        model: the backbone: a folder, GGUF file or hub id (ID@REVISION), `smollm2` or `embedded`.
        data, eval_data: JSON, JSONL or Parquet files, folders, or `datasets` ids (ID:SPLIT); without `eval_data`, some rows of
            the data are held out.
        output: folder for everything that is saved.
        method: the recipe that sets the options; `medusa train --help` lists them.
        config: YAML file of options; `options` override it.
        heads: folder or hub id of heads to start from; None: copies of the LM head.
        hidden_states, resume, callbacks: see `medusa.training.run.train_heads`.
        dtype, device: bfloat16, float16 or float32 (None: the backbone's own); where to train (None: a GPU if there is one).
        trust_remote_code: run code that comes with the model.
        options: fields of `TrainingConfig`, such as `num_heads=3` or `max_steps=1000`.

    Raises:
        MedusaError: an option, file, model or folder cannot be used, before anything is loaded where that can be known; or
            the loss is not a number or explodes.
    """
    recipe = resolve_options(method, config, options)
    refuse_begun(Path(output), resume)
    for source in (*sources_of(data), *sources_of(eval_data or ())):
        next(read_samples(source, Skips()), None)
    start = _start(heads) if heads is not None else None
    tokenizer = named.load_tokenizer(model, trust_remote_code)
    backbone = named.load_backbone(model, dtype, device, trust_remote_code, recipe.quantization)
    medusa = MedusaModel(backbone, None if start is None else load_heads(start))
    length = min(recipe.max_length, medusa.max_length or recipe.max_length)
    rows = load_rows(data, tokenizer, length, medusa.vocab_size, recipe.packing, progress=is_main_process())
    eval_rows = None if eval_data is None else load_rows(eval_data, tokenizer, length, medusa.vocab_size)
    if is_main_process():
        note_rows(rows, recipe.held_out if eval_rows is None else None)
    metrics = train_heads(medusa, rows, output, recipe, eval_rows, resume, hidden_states, callbacks)
    if is_main_process() and recipe.backbone == "full":
        tokenizer.save_pretrained(output)
    return Trained(Path(output), recipe, metrics)


def _start(heads: str) -> Path:
    """The folder of the heads to start from."""
    folder = find_heads(heads)
    if not has_heads(folder):
        raise InvalidInput(f"{heads} has no Medusa heads to start from; drop --heads or give a folder with heads")
    return folder


def training_rows(
    model: str,
    data: Data,
    *,
    method: str = METHOD,
    config: str | Path | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[Rows, Any]:
    """The rows that `train` would learn from, and the tokenizer; no weights are loaded. The arguments are those of `train`."""
    recipe = resolve_options(method, config, options)
    tokenizer = named.load_tokenizer(model, trust_remote_code)
    sizes = load_config(find_model(model, code=trust_remote_code), trust_remote_code=trust_remote_code)
    length = min(recipe.max_length, max_length_of(sizes) or recipe.max_length)
    return load_rows(data, tokenizer, length, sizes.vocab_size, recipe.packing), tokenizer


def resolve_options(method: str, config: str | Path | None, options: dict[str, Any]) -> TrainingConfig:
    """The configuration of a run: the method's recipe, then the YAML file, then the options; an error if one cannot be used."""
    settings = (read_options(Path(config)) if config is not None else {}) | options
    return resolve(method, settings, str(config) if config is not None else "training options")


def note_rows(rows: Rows, held_out: float | None = None) -> None:
    """Note the number of rows and tokens, what was cut or skipped, and if none is left to evaluate on.

    Args:
        held_out: share of the rows to evaluate on; None: they are not needed for that.
    """
    note(f"{len(rows)} rows, {rows.tokens:,} tokens, {rows.labelled:,} of them labelled")
    if rows.cut:
        note(f"{rows.cut} samples were longer than {rows.max_length} tokens and were cut")
    if rows.skips:
        note(f"skipped {rows.skips}")
    if held_out is not None and not number_to_hold_out(rows, held_out):
        why = f"fewer than {FEWEST_TO_HOLD_OUT_OF} rows are too few to hold any out" if held_out else "no rows are held out"
        note(f"{why}: the heads are evaluated on training rows, which flatters them; --eval-data is better")


def distill(
    model: str,
    data: str | Path,
    output: str | Path,
    *,
    heads: str | None = None,
    tree: str | None = None,
    endpoint: str | Sequence[str] | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    samples: int = 1000,
    limit: int | None = None,
    ray: int = 0,
    quantization: str = "none",
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Distilled:
    """Have a model answer prompts, and save the answers as training data for `train` (paper 2.3.2).

        medusa.distill("smollm2", data="prompts.jsonl", output="answers", max_new_tokens=256)
        medusa.train("smollm2", data="answers", output="heads")

    If interrupted, the same call resumes. Samples that fail are counted in the result; the same call tries them again.

    Args:
        model: the model, as in `train`; with an endpoint its name there.
        data: prompts: .txt, JSON, JSONL, Parquet, a folder, a `datasets` id (ID:SPLIT); or `self`: the model writes them.
        output: folder of JSONL shards.
        heads, tree: Medusa heads and tree to decode with; None: those of the model, if any.
        endpoint, api_key_env: address of an OpenAI-compatible server that runs the model, or several that share the work;
            environment variable with their key.
        samples, limit: number of conversations, with `data="self"`; number of prompts to use, from the first; None: all.
        ray: number of workers of a Ray Data job; 0: this process.
        quantization, dtype, device, trust_remote_code: as in `train`.
        options: fields of `Distillation`, such as `temperature=0.7`, `max_new_tokens=256` or `self_talk=2`.

    Raises:
        MedusaError: an option, file, model or folder cannot be used, before anything is loaded where that can be known.
    """
    _check(samples, limit, ray, only_here=data == "self", elsewhere=endpoint is not None or ray > 0)
    how = from_mapping(Distillation, options, "distillation options")
    made_by = {"model": model, "heads": heads, "endpoint": endpoint is not None, **how.lasting}  # other servers may resume
    Shards.refuse_other(Path(output), made_by)

    def answerer() -> Answerer:
        if endpoint is not None:
            return EndpointAnswerer(Endpoint(endpoint, model, os.environ.get(api_key_env)), how)
        medusa = named.load_model(model, heads, tree, dtype, device, trust_remote_code, quantization, heads_wanted=False)
        named.note_advice_on_tree(medusa, model, heads, tree)
        return ModelAnswerer(medusa, named.load_tokenizer(model, trust_remote_code), how)

    if data == "self":
        return _answer_own_questions(answerer(), Path(output), samples, how, made_by)
    seeds = read_seeds(data, skips := Skips())[:limit]
    if not seeds:
        raise InvalidInput(f"{data} holds no prompts: {skips or 'it is empty'}")
    chosen = RayAnswerer(answerer, ray, how.batch_size) if ray else answerer()
    return answer_seeds(seeds, chosen, Shards(output, made_by), skips)  # made last: a run that cannot load leaves no folder


def _check(samples: int, limit: int | None, ray: int, only_here: bool, elsewhere: bool) -> None:
    if samples < 1 or (limit is not None and limit < 1) or ray < 0:
        raise InvalidInput(f"samples is {samples}, limit {limit}, ray {ray}; expected at least 1, and at least 0 for ray")
    if only_here and elsewhere:
        raise InvalidInput("--data self runs only on this machine; drop --endpoint and --ray")


def _answer_own_questions(own: Any, output: Path, samples: int, how: Distillation, made_by: dict[str, Any]) -> Distilled:
    """Have a `ModelAnswerer` write the questions too."""
    check_template(own.tokenizer)  # before there is a folder
    shards, skips = Shards(output, made_by), Skips()
    questions = write_questions(own.model, own.tokenizer, output, samples, how.batch_size, how.seed, how.compile)
    return answer_seeds(read_seeds(questions, skips)[:samples], own, shards, skips)
