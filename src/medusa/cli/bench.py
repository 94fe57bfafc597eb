"""medusa bench: decoders side by side on published prompt sets or one's own."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common
from medusa.errors import InvalidInput

if TYPE_CHECKING:
    from medusa.evaluation.decoders import Decoder
    from medusa.evaluation.prompts import Question
    from medusa.model import MedusaModel

DECODERS = ("generate", "plain", "medusa", "prompt-lookup", "assisted")
LOOKUP_TOKENS = 10  # that prompt lookup guesses at a time, as transformers' documentation has it


def bench_command(
    model: common.ModelArgument = "embedded",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results; a run there is gone on with.")] = Path(
        "bench"
    ),
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="held-out (default for `embedded`), mt-bench, humaneval, or a file, folder or hub id[:split] of prompts.",
        ),
    ] = None,
    references: Annotated[Path | None, typer.Option("--references", help="Reference answers by question_id.")] = None,
    category: Annotated[list[str] | None, typer.Option("--category", help="Only of this category; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="So many questions, spread over the set.")] = None,
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
    rounds: Annotated[int, typer.Option("--rounds", help="Times each question is answered; the median time counts.")] = 1,
    quality: Annotated[
        bool, typer.Option("--quality", help="Likelihood under the original backbone, variety, code that compiles.")
    ] = False,
    quantization: common.QuantizationOption = "none",
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    compile: common.CompileOption = False,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Measure decoders on the same prompts, interleaved in one run. Killed, it goes on where it was."""
    names = list(dict.fromkeys(decoder or DECODERS[:3]))
    _check(names, draft, gamma or [], rounds, max_new_tokens)
    prompts = prompts or ("held-out" if model == "embedded" else None)
    if prompts is None:
        raise InvalidInput("no prompts; pass --prompts with a set, a file or a hub id (held-out is of `embedded`)")
    options = {
        kind: common.sampling_options(temperature, None, None, None, None, kind, epsilon, delta, seed)
        for kind in dict.fromkeys(acceptance or ["exact"])
    }
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from medusa.adapter import has_adapter
    from medusa.evaluation.bench import CLAIM, RUNS, Asking, Scorer, answer_records, fitting, measurements, run_bench
    from medusa.evaluation.decoders import MedusaDecoder
    from medusa.evaluation.prompts import read_questions, select
    from medusa.evaluation.report import summarise
    from medusa.hub import local_folder
    from medusa.provenance import environment, fingerprint, heads_fingerprint
    from medusa.records import Journal, claim

    questions = select(read_questions(prompts, references), category or (), limit)
    tokenizer = common.load_tokenizer(model, trust_remote_code)
    if prompts == "held-out" and model != "embedded" and tokenizer.get_vocab() != common.load_tokenizer("embedded").get_vocab():
        raise InvalidInput("held-out is in the embedded model's tokens, and this model has others; pass other --prompts")
    medusa = common.load_model(
        model, heads, None, dtype, device, trust_remote_code, quantization, heads_wanted="medusa" in names
    )
    drafting = common.load_model(draft, None, None, dtype, device, trust_remote_code, heads_wanted=False) if draft else None
    stops = sorted({*medusa.eos_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": stops or None}
    trees = {_stem(name, tree or []): given for name in tree or [] if (given := common.load_tree(name)) is not None}
    decoders: dict[str, Decoder] = {}
    for name in names:
        decoders |= _decoders(name, medusa, trees, options, drafting, gamma or [4], compile, limits)

    asking = Asking(tokenizer, stops)
    room = None if medusa.context is None else medusa.context - max_new_tokens
    questions, others = fitting(questions, asking, room)
    if others:
        common.note(f"left out, their prompts being empty or too long for the context: {', '.join(q.id for q in others)}")
    if not questions:
        raise InvalidInput(f"no prompt fits the context of {medusa.context} with {max_new_tokens} new tokens")
    made_with = {
        "model": model,
        "backbone": fingerprint(medusa),
        "heads": heads_fingerprint(medusa.heads) if medusa.heads is not None else None,
        "trees": {name: given.to_dict() for name, given in (trees or {"own": medusa.tree}).items()},
        "decoders": list(decoders),
        "draft": fingerprint(drafting) if drafting is not None else None,
        "prompts": prompts,
        "questions": _digest(questions),
        "categories": category or [],
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "epsilon": epsilon,
        "delta": delta,
        "dtype": str(medusa.backbone.dtype).removeprefix("torch."),
        "quantization": quantization,
        "compile": compile,
        **environment(medusa.device),
    }
    claim(output / CLAIM, made_with)
    journal = Journal(output / RUNS, "run of a bench")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(decoders) * len(questions) * rounds)
        run_bench(decoders, questions, asking, journal, rounds, room, lambda: progress.advance(task))

    measured = measurements(journal, questions, list(decoders), rounds)
    comparable = [name for name, each in decoders.items() if not temperature or isinstance(each, MedusaDecoder)]
    scorer = None
    if quality:
        common.note("scoring the answers")
        original = medusa
        if heads is not None and has_adapter(local_folder(heads)):  # Medusa-2's backbone is another
            original = common.load_model(model, None, None, dtype, device, trust_remote_code, quantization, heads_wanted=False)
        scorer = Scorer(original, asking)
    record = {
        "made_with": json.loads(json.dumps(made_with)),
        "rounds": rounds,
        "left_out": [question.id for question in others],
        "decoders": summarise(measured, questions, comparable, scorer),
    }
    _save(output, record, answer_records(questions, measured, asking))
    if as_json:
        print(json.dumps(record))
    else:
        _show(record)
    common.note(f"the whole report, by category, and the answers are in {output}")


def _save(output: Path, record: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    from medusa.evaluation.page import page
    from medusa.evaluation.report import markdown
    from medusa.files import write_text

    write_text(output / "answers.jsonl", "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    write_text(output / "results.json", json.dumps(record, indent=2) + "\n")
    write_text(output / "results.md", markdown(record))
    if importlib.util.find_spec("matplotlib") is None:
        common.note("no results.html without matplotlib: pip install 'medusa-decoding[plots]' and run the same command again")
    else:
        write_text(output / "results.html", page(record))


def _show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from medusa.evaluation.prompts import OVERALL
    from medusa.evaluation.report import TERSE, cells

    header, rows = cells(record["decoders"], OVERALL, TERSE)
    table = Table(Column(header[0], no_wrap=True), *header[1:])
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)


def _check(names: list[str], draft: str | None, gamma: list[int], rounds: int, max_new_tokens: int) -> None:
    for name in names:
        if name not in DECODERS:
            raise InvalidInput(f"--decoder is {name!r}, wanted one of {', '.join(DECODERS)}")
    if ("assisted" in names) != (draft is not None):
        raise InvalidInput("speculative decoding takes both --decoder assisted and --draft MODEL")
    for name, value in (("rounds", rounds), ("max-new-tokens", max_new_tokens), *(("gamma", g) for g in gamma)):
        if value < 1:
            raise InvalidInput(f"--{name} is {value}, wanted at least 1")


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
    from medusa.tree import MedusaTree

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


def _digest(questions: list[Question]) -> str:
    told = json.dumps([dataclasses.asdict(question) for question in questions])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
