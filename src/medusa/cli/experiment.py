"""medusa experiment: the paper's experiments on any model and heads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, measuring, showing
from medusa.errors import InvalidInput

if TYPE_CHECKING:
    from medusa.evaluation.catalog import Experiment
    from medusa.model import MedusaModel
    from medusa.tuning.calibrate import Recorded

CALIBRATED_ON, PROMPT_TOKENS = 64, 256  # prompts, and tokens of each, that trees are searched on


def experiment_command(
    name: Annotated[
        str, typer.Argument(help="figure-3, figure-4, figure-5, figure-7, table-1, table-3 or table-4.", show_default=False)
    ],
    model: common.ModelArgument = "embedded",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results; a run there is gone on with (default: experiments/NAME)."),
    ] = None,
    prompts: measuring.PromptsOption = None,
    category: measuring.CategoryOption = None,
    limit: measuring.LimitOption = None,
    heads: common.HeadsOption = None,
    medusa_2: Annotated[
        str | None, typer.Option("--medusa-2", help="Heads with the adapter of a backbone trained together with them.")
    ] = None,
    draft: Annotated[
        list[str] | None, typer.Option("--draft", help="Folder or hub id of a draft model; repeatable (table-1, figure-7).")
    ] = None,
    gamma: Annotated[
        list[int] | None,
        typer.Option("--gamma", help="Tokens a draft model guesses at a time; repeatable (table-1, figure-7)."),
    ] = None,
    nodes: Annotated[
        list[int] | None,
        typer.Option("--nodes", help="Sizes of trees, the root included; repeatable for figure-4, one for table-3."),
    ] = None,
    epsilon: Annotated[
        list[float] | None, typer.Option("--epsilon", help="Thresholds of figure-5; repeatable (default: 0.01 to 0.25).")
    ] = None,
    calibration_prompts: Annotated[
        str | None,
        typer.Option(
            "--calibration-prompts",
            help="Text to search trees on, other than --prompts: a set, file or hub id (default for `embedded`: its own).",
        ),
    ] = None,
    max_new_tokens: common.MaxNewTokens = 128,
    rounds: measuring.RoundsOption = 1,
    gguf_file: common.GgufOption = None,
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    compile: common.CompileOption = False,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Repeat one of the paper's experiments: its decoders on the same prompts, its figures beside what is measured here.

    Killed, it goes on where it was.
    """
    model = common.with_file(model, gguf_file, revision)
    from medusa.evaluation.bench import Scorer
    from medusa.evaluation.catalog import Subject
    from medusa.evaluation.experiments import named, run, save
    from medusa.evaluation.prompts import OVERALL, read_questions, select
    from medusa.evaluation.report import cells
    from medusa.runs.provenance import fingerprint
    from medusa.tuning.calibrate import record

    experiment = named(name)
    given = {"prompts": prompts, "medusa-2": medusa_2, "draft": draft, "gamma": gamma, "nodes": nodes, "epsilon": epsilon}
    _check(name, experiment, {**given, "calibration-prompts": calibration_prompts})
    _check_values(name, gamma or [], nodes or [], epsilon or [])
    measuring.at_least_one(rounds=rounds, max_new_tokens=max_new_tokens)
    prompts = measuring.prompts_of(model, prompts)
    if experiment.calibrates and calibration_prompts is None and model != "embedded":
        raise InvalidInput(
            f"{name} searches trees; pass --calibration-prompts FILE with text like the prompts, none of it theirs"
        )
    questions = select(read_questions(prompts), category or (), limit)
    calibrating = measuring.calibration_questions(calibration_prompts)
    tokenizer = common.load_tokenizer(model, trust_remote_code)
    measuring.check_tokens(model, prompts, tokenizer)

    def load(folder: str, its_heads: str | None = None, heads_wanted: bool = False) -> MedusaModel:
        return common.load_model(
            folder, its_heads, None, dtype, device, trust_remote_code=trust_remote_code, heads_wanted=heads_wanted
        )

    medusa = load(model, heads, heads_wanted="draft" not in experiment.needs)
    exam = measuring.exam_of(medusa, tokenizer, questions, max_new_tokens)
    output = output or Path("experiments") / name

    def recorded(which: MedusaModel) -> list[Recorded]:
        texts = measuring.calibration_prompts(
            model, calibration_prompts, calibrating, which, CALIBRATED_ON, PROMPT_TOKENS, max_new_tokens, trust_remote_code
        )
        folder = output / ("recorded" if which is medusa else "recorded-medusa-2")
        with measuring.progress("calibrating", len(texts)) as advance:
            return record(which, texts, max_new_tokens, folder=folder, on_progress=advance)

    subject = Subject(
        medusa,
        exam.limits,
        recorded,
        _sibling(load, model, medusa_2) if medusa_2 is not None else None,
        {_short(folder, draft or []): load(folder) for folder in draft or ()},
        nodes or (),
        epsilon or (),
        gamma or (),
        compile,
    )
    for row in experiment.missing(subject):
        common.note(f"left out: {row}")
    contenders = experiment.contenders(subject)
    sibling = subject.medusa_2
    made_with = measuring.made_with(
        medusa,
        model,
        exam,
        prompts,
        compile,
        tree=medusa.tree.to_dict(),
        medusa_2=None
        if sibling is None or sibling.heads is None
        else [fingerprint(sibling.backbone), fingerprint(sibling.heads)],
        drafts={title: fingerprint(each.backbone) for title, each in subject.drafts.items()},
    )
    scorer = None
    if experiment.quality:
        scorer = Scorer(measuring.original_of(medusa, heads, lambda: load(model)), exam.asking)
    with measuring.progress("measuring", len(contenders) * len(exam.questions) * rounds) as advance:
        found = run(name, subject, contenders, exam, scorer, output, made_with, rounds, advance)
    plots = importlib.util.find_spec("matplotlib") is not None
    if experiment.axis is not None and not plots:
        common.note("no figure without matplotlib: pip install 'medusa-decoding[plots]' and run the same command again")
    save(found, output, draw=plots)
    if as_json:
        print(json.dumps(found))
    else:
        showing.print_table(*cells(found["decoders"], OVERALL, experiment.columns))
    common.note(f"the paper's figures beside these, and the whole record, are in {output}")


def _check(name: str, experiment: Experiment, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is None and option in experiment.needs:
            raise InvalidInput(f"{name} needs --{option}; see medusa experiment --help")
        if value is not None and option not in (*experiment.options, "prompts"):
            takes = ", ".join(f"--{taken}" for taken in ("prompts", *experiment.options))
            raise InvalidInput(f"{name} takes no --{option}; it takes {takes}")


def _check_values(name: str, gammas: list[int], nodes: list[int], epsilons: list[float]) -> None:
    measuring.at_least_one(gamma=min(gammas, default=1))
    if any(size < 2 for size in nodes):
        raise InvalidInput(f"--nodes is {min(nodes)}, wanted at least 2: the root alone is plain decoding")
    if name == "table-3" and len(nodes) > 1:
        raise InvalidInput(f"table-3 compares trees of one size, got --nodes {nodes}; figure-4 takes several")
    for value in epsilons:
        if not 0 < value <= 1:
            raise InvalidInput(f"--epsilon is {value}, wanted above 0 and at most 1")


def _short(folder: str, folders: list[str]) -> str:
    """What a draft model is called: the last part of its name, or all of it where two have one."""
    name = Path(folder).name
    return name if [Path(other).name for other in folders].count(name) == 1 else folder


def _sibling(load: Any, model: str, medusa_2: str) -> MedusaModel:
    """Medusa-2: the model with the adapter that was trained together with its heads."""
    from medusa.checkpoints.adapter import has_adapter
    from medusa.checkpoints.hub import find_heads

    if not has_adapter(find_heads(medusa_2)):
        raise InvalidInput(f"{medusa_2} holds no adapter; --medusa-2 takes what training with a LoRA backbone wrote")
    return load(model, medusa_2, heads_wanted=True)
