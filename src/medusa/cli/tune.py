"""medusa tune: calibrate the heads and choose the tree that is fastest on this machine."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, showing
from medusa.runs.console import note

if TYPE_CHECKING:
    from medusa.tuning.choice import Choices
    from medusa.tuning.options import Option
    from medusa.tuning.verbs import Tuned


class TreeKind(StrEnum):
    STATIC = "static"
    DYNAMIC = "dynamic"
    COPYING = "copying"
    INDEPENDENT = "independent"


def tune_command(
    model: common.ModelArgument = "embedded",
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", help="Prompts like those the model will see: a set, file or hub id (default for `embedded`: its own)."
        ),
    ] = None,
    heads: common.HeadsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Tree file to write; the measurements behind the choice are saved beside it and reused."
        ),
    ] = None,
    nodes: Annotated[
        list[int] | None,
        typer.Option("--nodes", min=2, help="Tree size to try, the root included; repeatable (default: 2 to 128)."),
    ] = None,
    kind: Annotated[
        list[TreeKind] | None, typer.Option("--kind", help="Kind of tree to try; repeatable (default: the first three).")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size to choose a tree for; repeatable (default: 1).")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option("--context", min=1, help="Context length for timing steps; repeatable (default: the prompts' median)."),
    ] = None,
    always: Annotated[bool, typer.Option("--always", help="Choose a tree even if plain decoding is faster.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Number of prompts to use, spread evenly over the set.")] = 64,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Number of tokens to use of each text; conversations are not cut.")
    ] = 256,
    max_new_tokens: common.MaxNewTokens = 128,
    temperature: common.Temperature = 0.0,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Number of guesses of each head that may become nodes.")] = 64,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Number of prompts continued together while recording.")
    ] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Number of times each tree's steps are timed, in turn.")] = 5,
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
    """Choose the tree with the most tokens per second on this machine, or plain decoding if no tree pays off: record answers
    and the heads' guesses, replay trees of all kinds, sizes and depths on them, and time steps (paper 2.3.3, 2.2.3)."""
    from medusa.tuning.verbs import tune

    kinds = [str(each) for each in kind or ()]
    lists: dict[str, Any] = {"nodes": nodes, "kinds": kinds, "batches": batch, "contexts": context}
    tuned = tune(
        common.with_file(model, gguf_file, revision),
        prompts,
        output,
        heads=heads,
        limit=limit,
        prompt_tokens=prompt_tokens,
        dtype=dtype,
        device=device,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        **{name: values for name, values in lists.items() if values},
        always=always,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        ranks=ranks,
        batch_size=batch_size,
        rounds=rounds,
        compile=compile,
    )
    if output is not None:
        note(f"tree saved as {output}; beside it calibration.json, tuning.json and their plots")
    if as_json:
        print(json.dumps(tuned.to_dict()))
    else:
        _show(tuned)


def _show(tuned: Tuned) -> None:
    """Print accuracies, all options with the choice in bold, and what the choice gains."""
    accuracies, choices = tuned.calibration.accuracies, tuned.choices
    ranks = min(8, max(map(len, accuracies)))
    showing.print_table(
        ["head", *(f"guess {rank + 1}" for rank in range(ranks))],
        [[str(k), *(f"{accuracy:.3f}" for accuracy in row[:ranks])] for k, row in enumerate(accuracies, 1)],
        title="how often each guess is right",
    )
    _show_options(choices, "kinds and sizes, each at its best depth", [choices.plain, *choices.options])
    _show_options(choices, "what each head adds", choices.by_depth)
    static = [(option.if_independent, option) for option in choices.options if option.if_independent is not None]
    if static:
        expected, option = max(static, key=lambda each: each[0])
        error = 100 * (expected / option.acceleration_rate - 1)
        print(f"if heads erred independently, {option.name} would accept {expected:.2f} tokens per step: {error:+.0f} %")
    for batch, option in choices.chosen.items():
        why = ": no tree pays off here, so the heads are not used; train them for longer" if option.kind == "plain" else ""
        print(f"batch {batch}: {option.name}, {option.speedup(choices.plain, batch):.2f} times plain decoding{why}")
    print(f"recommended number of heads: {choices.recommended_heads}")


def _show_options(choices: Choices, title: str, options: list[Option]) -> None:
    """Print a table of options; nothing if there are none."""
    if not options:
        return
    batches = choices.chosen
    figures = [
        f"{figure}{f', batch {batch}' if len(batches) > 1 else ''}"
        for batch in batches
        for figure in ("ms", "overhead", "speedup")
    ]
    picked = [option.tree for option in batches.values()]
    showing.print_table(
        ["tree", "tokens per step", *figures],
        [_cells(option, choices.plain) for option in options],
        title,
        bold={number for number, option in enumerate(options) if option.tree in picked},
    )


def _cells(option: Option, plain: Option) -> list[str]:
    low, high = option.interval
    cells = [option.name, f"{option.acceleration_rate:.2f} ({low:.2f}-{high:.2f})"]
    for batch, seconds in option.step_seconds.items():
        cells += [f"{1e3 * seconds:.2f}", f"{option.overhead(plain, batch):.2f}", f"{option.speedup(plain, batch):.2f}"]
    return cells
