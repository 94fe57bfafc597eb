"""medusa tune: calibrate the heads and choose the tree that is fastest on this machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, measuring, showing
from medusa.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.model import MedusaModel
    from medusa.tuning.calibrate import Recorded
    from medusa.tuning.tune import Option, Tuned


def tune_command(
    model: common.ModelArgument = "embedded",
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", help="Text like the model will see: a set, file or hub id (default for `embedded`: its own)."
        ),
    ] = None,
    heads: common.HeadsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to write the tree; what it was chosen by goes beside it, and is gone on with."
        ),
    ] = None,
    nodes: Annotated[
        list[int] | None, typer.Option("--nodes", help="Sizes to try, the root included; repeatable (default: 2 to 128).")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="static, dynamic, copying or independent; repeatable (default: the first three)."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Batch sizes to choose a tree for; repeatable (default: 1).")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option("--context", help="Context lengths at which steps are timed; repeatable (default: the prompts' median)."),
    ] = None,
    always: Annotated[bool, typer.Option("--always", help="Choose a tree even where plain decoding is faster.")] = False,
    max_prompts: Annotated[int, typer.Option("--max-prompts", help="Prompts used.")] = 64,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Tokens of each prompt used; conversations are not cut.")
    ] = 256,
    max_new_tokens: common.MaxNewTokens = 128,
    temperature: common.Temperature = 0.0,
    ranks: Annotated[int, typer.Option("--ranks", help="Guesses of each head that may become nodes.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts continued together while calibrating.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", help="Times that each tree's steps are timed, in turn.")] = 5,
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
    """Record what the backbone says and its heads guess, replay trees of all kinds and sizes on it, time their steps here, and
    choose the one with the most tokens a second; plain decoding where none pays (paper 2.3.3, 2.2.3)."""
    model = common.with_file(model, gguf_file, revision)
    from medusa.tuning.tune import KINDS, SIZES, copied_nodes, room_to_time

    sizes, kinds, batches = nodes or list(SIZES), kind or list(KINDS[:3]), batch or [1]
    _check(sizes, kinds, batches, context or [1], [max_prompts, prompt_tokens, ranks, batch_size, rounds], temperature)
    if prompts is None and model != "embedded":
        raise InvalidInput("no prompts; pass --prompts FILE with text like the model will see")
    common.require_heads(model, heads)
    questions = measuring.calibration_questions(prompts)
    if len(questions) == 1:
        raise InvalidInput(f"{prompts} holds one prompt, which cannot both choose trees and judge them; give more prompts")
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn

    from medusa.trees.files import Tree, TreeChoice, save_tree
    from medusa.tuning.calibrate import Calibration, record
    from medusa.tuning.tune import Measure, Trees, measure_steps, tune

    medusa = common.load_model(model, heads, None, dtype, device, trust_remote_code, quantization)
    copied = max(copied_nodes(which, size) for which in kinds for size in sizes)
    room = room_to_time(medusa.num_heads, max(medusa.num_heads, copied))
    _check_room(medusa, context or [], room)
    chosen_prompts = measuring.calibration_prompts(
        model, prompts, questions, medusa, max_prompts, prompt_tokens, max_new_tokens, trust_remote_code
    )
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("recording", total=len(chosen_prompts))
        texts = record(
            medusa,
            chosen_prompts,
            max_new_tokens,
            ranks,
            temperature,
            batch_size=batch_size,
            folder=output.parent / "recorded" if output is not None else None,
            on_progress=lambda done: progress.advance(task, done),
        )
        progress.add_task("searching trees", total=None)
        trees = Trees(texts)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "seed": 0} if temperature else {}
        lengths = context or [_usual_length(texts, medusa, room)]

        def measure(tried: Any, rows: int) -> list[float]:
            task = progress.add_task(f"timing steps, batch {rows}", total=len(tried) * (rounds + 1) * len(lengths))
            seconds = [
                measure_steps(
                    medusa,
                    tried,
                    _rows(texts, rows, length),
                    rounds=rounds,
                    on_progress=lambda: progress.advance(task),
                    compile=compile,
                    **sampling,
                )
                for length in lengths
            ]
            return [sum(each) / len(lengths) for each in zip(*seconds, strict=True)]

        timed: Measure = measure
        tuned = tune(trees, timed, kinds, sizes, sorted(batches), always)
    picked = {size: option.tree for size, option in tuned.chosen.items()}
    tree: Tree = picked[min(picked)] if len(set(picked.values())) == 1 else TreeChoice(picked)
    calibration = Calibration.of(texts)
    made_with = _made_with(medusa, prompts, lengths, compile)
    report = {
        "tree": tree.to_dict(),
        **tuned.to_dict(),
        "calibration": {
            "accuracies": calibration.accuracies,
            "positions": calibration.positions,
            "texts": len(texts),
            "temperature": temperature,
        },
        "made_with": made_with,
    }
    if output is not None:
        from medusa.runs.files import write_text

        save_tree(tree, output)
        write_text(output.parent / "calibration.json", json.dumps({**calibration.to_dict(), "made_with": made_with}) + "\n")
        write_text(output.parent / "tuning.json", json.dumps(report, indent=2) + "\n")
        if importlib.util.find_spec("matplotlib") is not None:
            from medusa.tuning.curve import draw_calibration, draw_curve

            draw_curve(tuned, output.parent / "tuning.png")
            draw_calibration(calibration, output.parent / "calibration.png")
        common.note(f"tree saved as {output}; beside it calibration.json, tuning.json and their plots")
    if as_json:
        print(json.dumps(report))
    else:
        _show(tuned, calibration.accuracies)


def _check(
    sizes: list[int], kinds: list[str], batches: list[int], contexts: list[int], counts: list[int], temperature: float
) -> None:
    from medusa.tuning.tune import KINDS

    if temperature < 0:
        raise InvalidInput(f"temperature is {temperature}, wanted 0 (greedy) or more")
    if any(size < 2 for size in sizes):
        raise InvalidInput(f"--nodes is {min(sizes)}, wanted at least 2: the root alone is always tried")
    for name, values in (("batch", batches), ("context", contexts)):
        if min(values) < 1:
            raise InvalidInput(f"--{name} is {min(values)}, wanted at least 1")
    for name, value in zip(("max-prompts", "prompt-tokens", "ranks", "batch-size", "rounds"), counts, strict=True):
        if value < 1:
            raise InvalidInput(f"--{name} is {value}, wanted at least 1")
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidInput(f"--kind is {kind!r}, wanted one of {', '.join(KINDS)}")


def _check_room(medusa: MedusaModel, lengths: list[int], room: int) -> None:
    if medusa.max_length is not None and max(lengths, default=1) + room > medusa.max_length:
        longest = medusa.max_length - room
        raise InvalidInput(f"--context is {max(lengths)}, wanted at most {longest}: timing adds {room} tokens to it")


def _usual_length(texts: list[Recorded], medusa: MedusaModel, room: int) -> int:
    """The median length of the prompts, as far as there is room to time steps after it."""
    import statistics

    usual = int(statistics.median(text.start + 1 for text in texts))
    return usual if medusa.max_length is None else max(1, min(usual, medusa.max_length - room))


def _rows(texts: list[Recorded], batch: int, length: int) -> Tensor:
    """(batch, length) of recorded text, from the beginning again where there is too little."""
    import torch

    every = torch.cat([text.ids for text in texts])
    repeats = -(-batch * length // len(every))
    return every.repeat(repeats)[: batch * length].view(batch, length)


def _made_with(medusa: MedusaModel, prompts: str | None, lengths: list[int], compile: bool) -> dict[str, Any]:
    from medusa.runs.provenance import environment, fingerprint

    assert medusa.heads is not None
    return {
        "prompts": prompts or "held out",
        "contexts": lengths,
        "compile": compile,
        "dtype": str(medusa.backbone.dtype).removeprefix("torch."),
        "backbone": fingerprint(medusa.backbone),
        "heads": fingerprint(medusa.heads),
        **environment(medusa.device),
    }


def _show(tuned: Tuned, accuracies: list[list[float]]) -> None:
    ranks = min(8, max(map(len, accuracies)))
    showing.print_table(
        ["head", *(f"guess {rank + 1}" for rank in range(ranks))],
        [[str(k), *(f"{accuracy:.3f}" for accuracy in row[:ranks])] for k, row in enumerate(accuracies, 1)],
        title="how often each guess is right",
    )

    def row(option: Option) -> list[str]:
        low, high = option.interval
        cells = [option.name, f"{option.acceleration_rate:.2f} ({low:.2f}-{high:.2f})"]
        for batch, seconds in option.step_seconds.items():
            speedup = option.tokens_per_second(batch) / tuned.plain.tokens_per_second(batch)
            cells += [f"{1e3 * seconds:.2f}", f"{seconds / tuned.plain.step_seconds[batch]:.2f}", f"{speedup:.2f}"]
        return cells

    picked = [option.tree for option in tuned.chosen.values()]
    for title, options in (("kinds and sizes", [tuned.plain, *tuned.options]), ("what each head adds", tuned.by_depth)):
        if options:
            of = [f"{what}{f', batch {b}' if len(tuned.chosen) > 1 else ''}" for b in tuned.chosen for what in FIGURES]
            chosen = {number for number, option in enumerate(options) if option.tree in picked}
            showing.print_table(["tree", "tokens a step", *of], [row(option) for option in options], title, bold=chosen)
    static = [(option.if_independent, option) for option in tuned.options if option.if_independent is not None]
    if static:
        expected, option = max(static, key=lambda each: each[0])
        errs = 100 * (expected / option.acceleration_rate - 1)
        print(f"if heads erred independently, {option.name} would accept {expected:.2f} tokens a step: {errs:+.0f} %")
    for batch, option in tuned.chosen.items():
        speedup = option.tokens_per_second(batch) / tuned.plain.tokens_per_second(batch)
        why = ": no tree pays here, so the heads are left unused; train them for longer" if option.kind == "plain" else ""
        print(f"batch {batch}: {option.name}, {speedup:.2f} times plain decoding{why}")
    print(f"heads worth having: {tuned.recommended_heads}")


FIGURES = ("ms", "overhead", "speedup")
