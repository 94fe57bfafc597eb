"""medusa bench: decoders side by side on published prompt sets or one's own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, measuring, showing
from medusa.errors import InvalidInput

if TYPE_CHECKING:
    from medusa.evaluation.decoders import Decoder
    from medusa.model import MedusaModel

DECODERS = ("generate", "plain", "medusa", "prompt-lookup", "assisted")
LOOKUP_TOKENS = 10  # that prompt lookup guesses at a time, as transformers' documentation has it


def bench_command(
    model: common.ModelArgument = "embedded",
    output: measuring.OutputOption = Path("bench"),
    prompts: measuring.PromptsOption = None,
    references: Annotated[Path | None, typer.Option("--references", help="Reference answers by question_id.")] = None,
    category: measuring.CategoryOption = None,
    limit: measuring.LimitOption = None,
    heads: common.HeadsOption = None,
    decoder: Annotated[
        list[str] | None,
        typer.Option("--decoder", help=f"{', '.join(DECODERS)}; repeatable (default: the first three)."),
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option("--tree", help="A tree file for medusa; repeatable (default: the heads' own).")
    ] = None,
    acceptance: Annotated[
        list[str] | None, typer.Option("--acceptance", help="exact or typical, for medusa; repeatable (default: exact).")
    ] = None,
    epsilon: common.Epsilon = 0.09,
    delta: common.Delta = 0.3,
    draft: Annotated[str | None, typer.Option("--draft", help="Folder or hub id of the draft model of `assisted`.")] = None,
    gamma: Annotated[
        list[int] | None, typer.Option("--gamma", help="Tokens the draft model guesses at a time; repeatable (default: 4).")
    ] = None,
    max_new_tokens: common.MaxNewTokens = 256,
    temperature: common.Temperature = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    rounds: measuring.RoundsOption = 1,
    quality: Annotated[
        bool, typer.Option("--quality", help="Likelihood under the original backbone, variety, code that compiles.")
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
    """Measure decoders on the same prompts, interleaved in one run. Killed, it goes on where it was."""
    model = common.with_file(model, gguf_file, revision)
    names = list(dict.fromkeys(decoder or DECODERS[:3]))
    _check(names, draft, gamma or [], rounds, max_new_tokens)
    prompts = measuring.prompts_of(model, prompts)
    kinds = dict.fromkeys(acceptance or ["exact"])
    thresholds = {"typical": (epsilon, delta), "exact": (0.09, 0.3) if "typical" in kinds else (epsilon, delta)}
    options = {
        kind: common.sampling_options(temperature, None, None, None, None, kind, *thresholds.get(kind, (epsilon, delta)), seed)
        for kind in kinds
    }
    from medusa.evaluation.bench import CLAIM, Scorer, take
    from medusa.evaluation.decoders import MedusaDecoder
    from medusa.evaluation.prompts import OVERALL, read_questions, select
    from medusa.evaluation.report import TERSE, cells, summarise
    from medusa.runs.provenance import fingerprint
    from medusa.runs.records import refuse_claimed

    questions = select(read_questions(prompts, references), category or (), limit)
    trees = {_stem(name, tree or []): given for name in tree or [] if (given := common.load_tree(name)) is not None}
    asked = {
        "model": model,
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "categories": category or [],
        "limit": limit,
        "temperature": temperature,
        "seed": seed,
        "epsilon": epsilon,
        "delta": delta,
        "quantization": quantization,
        "compile": compile,
    }
    refuse_claimed(output / CLAIM, asked)
    common.require_heads(model, heads, "medusa" not in names)
    tokenizer = common.load_tokenizer(model, trust_remote_code)
    measuring.check_tokens(model, prompts, tokenizer)
    medusa = common.load_model(
        model, heads, None, dtype, device, trust_remote_code, quantization, heads_wanted="medusa" in names
    )
    drafting = common.load_model(draft, None, None, dtype, device, trust_remote_code, heads_wanted=False) if draft else None
    if not trees:
        common.note_tree(medusa, model, heads, None)
    exam = measuring.exam_of(medusa, tokenizer, questions, max_new_tokens)
    decoders: dict[str, Decoder] = {}
    for name in names:
        decoders |= _decoders(name, medusa, trees, options, drafting, gamma or [4], compile, exam.limits)

    made_with = measuring.made_with(
        medusa,
        model,
        exam,
        prompts,
        compile,
        trees={name: given.to_dict() for name, given in (trees or {"own": medusa.tree}).items()},
        decoders=list(decoders),
        draft=fingerprint(drafting.backbone) if drafting is not None else None,
        categories=category or [],
        limit=limit,
        temperature=temperature,
        seed=seed,
        epsilon=epsilon,
        delta=delta,
        quantization=quantization,
    )
    with measuring.progress("measuring", len(decoders) * len(exam.questions) * rounds) as advance:
        measured = take(exam, decoders, output, made_with, rounds, advance)
    comparable = [name for name, each in decoders.items() if not temperature or isinstance(each, MedusaDecoder)]
    scorer = None
    if quality:
        common.note("scoring the answers")
        original = measuring.original_of(
            medusa,
            heads,
            lambda: common.load_model(model, None, None, dtype, device, trust_remote_code, quantization, heads_wanted=False),
        )
        scorer = Scorer(original, exam.asking)
    record = {
        "made_with": json.loads(json.dumps(made_with)),
        "rounds": rounds,
        "left_out": [question.id for question in exam.left_out],
        "decoders": summarise(measured, exam.questions, comparable, scorer),
    }
    _save(output, record)
    if as_json:
        print(json.dumps(record))
    else:
        showing.print_table(*cells(record["decoders"], OVERALL, TERSE))
    common.note(f"the whole report, by category, and the answers are in {output}")


def _save(output: Path, record: dict[str, Any]) -> None:
    from medusa.evaluation.page import page
    from medusa.evaluation.report import markdown
    from medusa.runs.files import write_text

    write_text(output / "results.json", json.dumps(record, indent=2) + "\n")
    write_text(output / "results.md", markdown(record))
    if importlib.util.find_spec("matplotlib") is None:
        common.note("no results.html without matplotlib: pip install 'medusa-decoding[plots]' and run the same command again")
    else:
        write_text(output / "results.html", page(record))


def _check(names: list[str], draft: str | None, gamma: list[int], rounds: int, max_new_tokens: int) -> None:
    for name in names:
        if name not in DECODERS:
            raise InvalidInput(f"--decoder is {name!r}, wanted one of {', '.join(DECODERS)}")
    if ("assisted" in names) != (draft is not None):
        raise InvalidInput("speculative decoding takes both --decoder assisted and --draft MODEL")
    measuring.at_least_one(rounds=rounds, max_new_tokens=max_new_tokens, gamma=min(gamma, default=1))


def _stem(name: str, names: list[str]) -> str:
    """What a tree is called in the report: its file's name, or all of its path where two have one name."""
    stem = Path(name).stem
    return stem if [Path(other).stem for other in names].count(stem) == 1 else name


def _decoders(
    kind: str,
    model: MedusaModel,
    trees: dict[str, Any],
    options: dict[str, dict[str, Any]],  # of sampling, by acceptance
    draft: MedusaModel | None,
    gammas: list[int],
    compile: bool,
    limits: dict[str, Any],
) -> dict[str, Decoder]:
    """The decoders that a kind stands for, by the names they have in the report."""
    from medusa.evaluation.decoders import MedusaDecoder, TransformersDecoder
    from medusa.trees.static import MedusaTree

    found: dict[str, Decoder] = {}
    exact = {**next(iter(options.values())), "acceptance": "exact"}
    if kind == "plain":
        found[kind] = MedusaDecoder(model, tree=MedusaTree([]), compile=compile, **exact, **limits)
    elif kind == "medusa":
        for name, tree in trees.items() or {"": None}.items():
            for acceptance, given in options.items():
                title = " ".join(filter(None, ("medusa", name, acceptance if acceptance != "exact" else "")))
                found[title] = MedusaDecoder(model, tree=tree, compile=compile, **given, **limits)
    else:
        theirs = {"seed": exact["seed"]}
        if exact.get("do_sample"):  # a top-k that nobody asked for is switched off, as in our loop
            top_k = model.backbone.generation_config.top_k or 0
            theirs |= {"do_sample": True, "temperature": exact["temperature"], "top_k": top_k}
        if kind == "generate":
            found[kind] = TransformersDecoder(model, **theirs, **limits)
        elif kind == "prompt-lookup":
            found[kind] = TransformersDecoder(model, guesses=LOOKUP_TOKENS, **theirs, **limits)
        else:
            assert draft is not None
            for gamma in gammas:
                found[f"assisted {gamma}"] = TransformersDecoder(model, draft=draft.backbone, guesses=gamma, **theirs, **limits)
    return found
