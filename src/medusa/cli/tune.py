"""medusa tune: calibrate the heads and choose the tree that is fastest on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, showing
from medusa.runs.console import note
from medusa.tuning.config import TuningConfig

if TYPE_CHECKING:
    from medusa.tuning.choice import Choices
    from medusa.tuning.options import Option
    from medusa.tuning.verbs import Tuned


@common.with_options(TuningConfig, common.Loading)
def tune_command(
    model: common.ModelArgument = "embedded",
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts like those the model will see: a named set, file or hub id (default for `embedded`: its own)."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Tree file to write; the measurements behind the choice are saved beside it and reused."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts to use, spread evenly over the set.")] = 64,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Number of tokens of each text to use; conversations are not cut.")
    ] = 256,
    quantization: common.QuantizationOption = "none",
    as_json: common.JsonOption = False,
    **options: Any,
) -> None:
    """Choose the tree with the most tokens per second on this machine, or plain decoding if no tree pays off: record answers
    and the heads' guesses, replay trees of all kinds, sizes and depths on them, and time steps (paper 2.3.3, 2.2.3)."""
    from medusa.tuning.verbs import tune

    model = common.full_name(model, options)
    options |= {"limit": limit, "prompt_tokens": prompt_tokens, "quantization": quantization}
    tuned = tune(model, prompts, output, **options)
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
