"""`medusa.bench` and `medusa.experiment`: the commands as functions, from models by name to a folder of results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa.checkpoints import named
from medusa.checkpoints.adapter import has_adapter
from medusa.checkpoints.hub import find_heads
from medusa.config import from_mapping
from medusa.data.prompt_sets import HELD_OUT, Prompter, Question, calibration_ids, default_prompts, read_questions, select
from medusa.errors import InvalidInput
from medusa.evaluation.answers import BENCH_FILE, PromptSet, measure_entries
from medusa.evaluation.catalog import Experiment, Setup
from medusa.evaluation.config import BenchConfig, ExperimentConfig
from medusa.evaluation.entries import bench_entries
from medusa.evaluation.experiments import find_experiment, measure_experiment, save_experiment
from medusa.evaluation.quality import Scorer
from medusa.evaluation.report import bench_page, save_report
from medusa.model import MedusaModel
from medusa.runs.console import note
from medusa.runs.plotting import can_plot
from medusa.runs.provenance import fingerprint, made_by
from medusa.runs.records import refuse_claimed
from medusa.tuning.recording import Recorded, record

CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 64, 256  # prompts to search trees on, and tokens of each


@dataclass(frozen=True)
class _Loading:
    dtype: str | None
    device: str | None
    trust_remote_code: bool
    quantization: str = "none"

    def model(self, name: str, heads: str | None = None, heads_needed: bool = False) -> MedusaModel:
        return named.load_model(
            name, heads, None, self.dtype, self.device, self.trust_remote_code, self.quantization, heads_wanted=heads_needed
        )

    def tokenizer(self, model: str, prompts: str) -> Any:
        """The model's tokenizer; the held-out prompts, which are token ids, are refused for a model with other tokens."""
        found = named.load_tokenizer(model, self.trust_remote_code)
        if prompts == HELD_OUT and model != "embedded" and found.get_vocab() != named.load_tokenizer("embedded").get_vocab():
            raise InvalidInput(
                "held-out consists of the embedded model's tokens, and this model has others; pass other --prompts"
            )
        return found

    def scorer(self, medusa: MedusaModel, model: str, heads: str | None, prompter: Prompter) -> Scorer:
        """A scorer by the original backbone: if the heads have an adapter, one loaded without it."""
        adapted = heads is not None and has_adapter(find_heads(heads))
        return Scorer(self.model(model) if adapted else medusa, prompter)


def bench(
    model: str = "embedded",
    prompts: str | None = None,
    output: str | Path = "bench",
    *,
    heads: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    quantization: str = "none",
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measure decoders on the same prompts, interleaved in one run; returns the object of `results.json`.

        found = medusa.bench("smollm2", prompts="mt-bench", output="results", limit=20, decoders=("generate", "medusa"))
        print(found["decoders"]["medusa"]["overall"]["speedup_vs_generate"])

    Notes and progress go to stderr. If interrupted, the same call resumes. For loaded models and your own decoders there is
    `medusa.evaluation.measurement.compare_decoders`.

    Args:
        model: a folder, GGUF file, hub id, `smollm2` or `embedded`.
        prompts: `held-out` (default for `embedded`), `mt-bench`, `humaneval`, a file, folder or hub id.
        output: folder for `results.json`, `results.md`, `results.html`, `answers.jsonl` and the runs behind them.
        heads: folder or hub id of the heads; None: those beside the backbone.
        dtype, device, quantization, trust_remote_code: as in `medusa.train`.
        options: fields of `BenchConfig`, such as `limit=20`, `temperature=0.7` or `quality=True`.

    Raises:
        MedusaError: an option, file, model or folder cannot be used, before anything is loaded where that can be known.
    """
    config = from_mapping(BenchConfig, options, "bench options")
    prompts, folder = default_prompts(model, prompts), Path(output)
    questions = select(read_questions(prompts, config.references), config.categories, config.limit)
    trees = {short: named.find_tree(name) for short, name in _short_names(config.trees, "stem").items()}
    settings: dict[str, Any] = {"categories": list(config.categories), "limit": config.limit, "quantization": quantization}
    settings |= {name: getattr(config, name) for name in ("temperature", "seed", "epsilon", "delta")}
    known = {"model": model, "prompts": prompts, "max_new_tokens": config.max_new_tokens, "compile": config.compile}
    refuse_claimed(folder / BENCH_FILE, known | settings)
    named.require_heads(model, heads, "medusa" not in config.decoders)
    loading = _Loading(dtype, device, trust_remote_code, quantization)
    tokenizer = loading.tokenizer(model, prompts)
    medusa = loading.model(model, heads, "medusa" in config.decoders)
    drafting = dataclasses.replace(loading, quantization="none").model(config.draft) if config.draft is not None else None
    if not trees:
        named.note_advice_on_tree(medusa, model, heads, None)
    prompt_set = PromptSet.of(medusa, tokenizer, questions, config.max_new_tokens)
    entries = bench_entries(config, medusa, prompt_set.limits, trees, drafting)
    settings |= {
        "trees": {name: tree.to_dict() for name, tree in (trees or {"own": medusa.tree}).items() if tree is not None},
        "decoders": list(entries),
        "draft": fingerprint(drafting.backbone) if drafting is not None else None,
    }
    made_with = _made_with(medusa, model, prompt_set, prompts, config.compile, settings)
    scorer = loading.scorer(medusa, model, heads, prompt_set.prompter) if config.quality else None
    found = measure_entries(entries, prompt_set, folder, made_with, config.rounds, scorer)
    save_report(found, bench_page(found), folder)
    _note_missing("plots in results.html")
    return found


def experiment(
    name: str,
    model: str = "embedded",
    prompts: str | None = None,
    output: str | Path | None = None,
    *,
    heads: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Repeat one of the paper's experiments and show the paper's figures beside those measured here; returns the object of
    `results.json`.

        found = medusa.experiment("figure-4", "smollm2", prompts="mt-bench", calibration_prompts="chats.jsonl", nodes=(8, 16))

    Notes and progress go to stderr. If interrupted, the same call resumes.

    Args:
        name: figure-3, figure-4, figure-5, figure-7, table-1, table-3 or table-4.
        output: folder for `results.json`, `results.md`, `results.html`, `answers.jsonl`, the figure and the runs behind them;
            None: `experiments/NAME`.
        model, prompts, heads, dtype, device, trust_remote_code: as in `bench`.
        options: fields of `ExperimentConfig`, such as `limit=20` or `nodes=(8, 16)`.

    Raises:
        MedusaError: the experiment does not take an option, or a file, model or folder cannot be used.
    """
    config = from_mapping(ExperimentConfig, options, "experiment options")
    chosen, prompts = _check_options(config, name, prompts, model), default_prompts(model, prompts)
    questions = select(read_questions(prompts), config.categories, config.limit)
    calibrating = None if config.calibration_prompts is None else read_questions(config.calibration_prompts)
    loading, folder = _Loading(dtype, device, trust_remote_code), Path(output or f"experiments/{name}")
    tokenizer = loading.tokenizer(model, prompts)
    medusa = loading.model(model, heads, "draft" not in chosen.needs)
    prompt_set = PromptSet.of(medusa, tokenizer, questions, config.max_new_tokens)

    def recorded(which: MedusaModel) -> list[Recorded]:
        kept = folder / ("recorded" if which is medusa else "recorded-medusa-2")
        return _record(which, calibrating, tokenizer, config.max_new_tokens, kept)

    medusa_2 = None if config.medusa_2 is None else loading.model(model, config.medusa_2, heads_needed=True)
    drafts = {short: loading.model(draft) for short, draft in _short_names(config.drafts, "name").items()}
    swept = config.nodes, config.epsilons, config.gammas
    setup = Setup(medusa, prompt_set.limits, recorded, medusa_2, drafts, *swept, config.compile)
    for row in chosen.missing(setup):
        note(f"left out: {row}")
    models: dict[str, Any] = {"tree": medusa.tree.to_dict(), "medusa_2": None}
    if medusa_2 is not None and medusa_2.heads is not None:
        models["medusa_2"] = [fingerprint(medusa_2.backbone), fingerprint(medusa_2.heads)]
    models["drafts"] = {title: fingerprint(each.backbone) for title, each in drafts.items()}
    made_with = _made_with(medusa, model, prompt_set, prompts, config.compile, models)
    scorer = loading.scorer(medusa, model, heads, prompt_set.prompter) if chosen.quality else None
    found = measure_experiment(name, setup, prompt_set, scorer, folder, made_with, config.rounds)
    save_experiment(found, folder)
    if chosen.axis is not None:
        _note_missing("figure")
    return found


def _note_missing(drawn: str) -> None:
    if not can_plot():
        note(f"no {drawn} without matplotlib: pip install 'medusa-decoding[plots]' and run the same command again")


def _record(
    model: MedusaModel, questions: Sequence[Question] | None, tokenizer: Any, max_new_tokens: int, folder: Path
) -> list[Recorded]:
    """Texts to search trees on; None: the embedded model's calibration prompts."""
    room = None if model.max_length is None else model.max_length - max_new_tokens - model.num_heads
    prompter = Prompter(tokenizer, model.eos_token_ids)
    texts = calibration_ids(questions, prompter, CALIBRATION_PROMPTS, CALIBRATION_TOKENS, room)
    return record(model, texts, max_new_tokens, folder=folder)


def _check_options(config: ExperimentConfig, name: str, prompts: str | None, model: str) -> Experiment:
    """The experiment of this name; options that it does not take, or that it lacks, are refused."""
    chosen = find_experiment(name)
    given: dict[str, Any] = {"prompts": prompts, "medusa-2": config.medusa_2, "draft": config.drafts, "gamma": config.gammas}
    given |= {"nodes": config.nodes, "epsilon": config.epsilons, "calibration-prompts": config.calibration_prompts}
    for option, value in given.items():
        if not value and option in chosen.needs:
            raise InvalidInput(f"{name} needs --{option}; see medusa experiment --help")
        if value and option not in (*chosen.options, "prompts"):
            takes = ", ".join(f"--{taken}" for taken in ("prompts", *chosen.options))
            raise InvalidInput(f"{name} takes no --{option}; it takes {takes}")
    if config.medusa_2 is not None and not has_adapter(find_heads(config.medusa_2)):
        raise InvalidInput(
            f"{config.medusa_2} holds no adapter; --medusa-2 takes the output of `medusa train --method medusa-2`"
        )
    if name == "table-3" and len(config.nodes) > 1:
        raise InvalidInput(f"table-3 compares trees of one size, got --nodes {list(config.nodes)}; figure-4 takes several")
    default_prompts(model, prompts)
    if chosen.calibrates and config.calibration_prompts is None and model != "embedded":
        raise InvalidInput(f"{name} searches trees; pass --calibration-prompts FILE with other prompts of the same kind")
    return chosen


def _short_names(paths: Sequence[str], part: str) -> dict[str, str]:
    """Paths by a part of each, `name` or `stem`, or by the whole path if two share that part."""
    shorts = [getattr(Path(path), part) for path in paths]
    return {short if shorts.count(short) == 1 else path: path for short, path in zip(shorts, paths, strict=True)}


def _made_with(
    medusa: MedusaModel, model: str, prompt_set: PromptSet, prompts: str, compile: bool, more: dict[str, Any]
) -> dict[str, Any]:
    """Model, machine and settings of answers; a folder holds only answers with the same ones."""
    known = {"model": model, "prompts": prompts, "questions": prompt_set.digest, "compile": compile}
    return known | {"max_new_tokens": prompt_set.limits["max_new_tokens"], **more, **made_by(medusa)}
