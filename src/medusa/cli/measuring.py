"""What `bench` and `experiment` share: questions by name, what they are measured on, and a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common
from medusa.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from medusa.evaluation.bench import Exam
    from medusa.evaluation.prompts import Question
    from medusa.model import MedusaModel

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for results; a run there is gone on with.")]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="held-out (default for `embedded`), mt-bench, humaneval, or your own: .txt, JSON, JSONL, Parquet, folder, hub id.",
    ),
]
CategoryOption = Annotated[list[str] | None, typer.Option("--category", help="Only of this category; repeatable.")]
LimitOption = Annotated[int | None, typer.Option("--limit", help="So many questions, spread over the set.")]
RoundsOption = Annotated[int, typer.Option("--rounds", help="Times each question is answered; the median time counts.")]


def prompts_of(model: str, prompts: str | None) -> str:
    """The set asked for, or the embedded model's own."""
    prompts = prompts or ("held-out" if model == "embedded" else None)
    if prompts is None:
        raise InvalidInput("no prompts; pass --prompts with a set, a file or a hub id (held-out is of `embedded`)")
    return prompts


def at_least_one(**values: int) -> None:
    """Refuse options, named by their keys, that are below 1."""
    for name, value in values.items():
        if value < 1:
            raise InvalidInput(f"--{name.replace('_', '-')} is {value}, wanted at least 1")


def check_tokens(model: str, prompts: str, tokenizer: Any) -> None:
    """Refuse the held-out prompts, which are token ids, for a model with other tokens."""
    if prompts == "held-out" and model != "embedded" and tokenizer.get_vocab() != common.load_tokenizer("embedded").get_vocab():
        raise InvalidInput("held-out is in the embedded model's tokens, and this model has others; pass other --prompts")


def exam_of(medusa: MedusaModel, tokenizer: Any, questions: list[Question], max_new_tokens: int) -> Exam:
    """The exam of these questions; what does not fit is left out and noted."""
    from medusa.evaluation.bench import Exam

    exam = Exam.of(medusa, tokenizer, questions, max_new_tokens)
    if exam.left_out:
        names = ", ".join(question.id for question in exam.left_out)
        common.note(f"left out, their prompts being empty or too long for the context: {names}")
    return exam


def original_of(medusa: MedusaModel, heads: str | None, load: Callable[[], MedusaModel]) -> MedusaModel:
    """The model whose backbone says how likely answers are: where the heads have an adapter, one loaded without them."""
    from medusa.checkpoints.adapter import has_adapter
    from medusa.checkpoints.hub import find_heads

    return load() if heads is not None and has_adapter(find_heads(heads)) else medusa


def calibration_questions(prompts: str | None) -> list[Question]:
    """The prompts that trees are chosen on; none where they are the embedded model's own. No model is needed to refuse them."""
    from medusa.evaluation.prompts import read_questions

    return [] if prompts is None else read_questions(prompts)


def calibration_prompts(
    model: str,
    prompts: str | None,
    questions: list[Question],
    medusa: MedusaModel,
    max_prompts: int,
    prompt_tokens: int,
    max_new_tokens: int,
    trust_remote_code: bool,
) -> list[Tensor]:
    """Token ids of prompts: under the model's chat template, or the beginnings of texts."""
    import torch

    from medusa.evaluation.bench import Asking
    from medusa.evaluation.prompts import held_out_prompts

    if prompts is None:
        return [prompt.ids[:prompt_tokens] for prompt in held_out_prompts("calibration")[:max_prompts]]
    asking = Asking(common.load_tokenizer(model, trust_remote_code), medusa.eos_token_ids)
    found = [asking.prompt(question, []) for question in questions]
    if not asking.chat:
        found = [ids[:prompt_tokens] for ids in found]
    room = None if medusa.max_length is None else medusa.max_length - max_new_tokens - medusa.num_heads
    found = [ids for ids in found if ids and (room is None or len(ids) <= room)]
    if not found:
        raise InvalidInput(f"{prompts} holds no prompt that leaves room for {max_new_tokens} new tokens in the context")
    stride = max(1, len(found) // max_prompts)
    return [torch.tensor(ids) for ids in found[::stride][:max_prompts]]


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; what is yielded advances it, by one unless told."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda by=1: bar.advance(task, by)


def made_with(medusa: MedusaModel, model: str, exam: Exam, prompts: str, compile: bool, **more: Any) -> dict[str, Any]:
    """What answers are made with; a folder holds those of one such record only."""
    from medusa.runs.provenance import environment, fingerprint

    return {
        "model": model,
        "backbone": fingerprint(medusa.backbone),
        "heads": fingerprint(medusa.heads) if medusa.heads is not None else None,
        **more,
        "prompts": prompts,
        "questions": exam.digest,
        "max_new_tokens": exam.limits["max_new_tokens"],
        "dtype": str(medusa.backbone.dtype).removeprefix("torch."),
        "compile": compile,
        **environment(medusa.device),
    }
