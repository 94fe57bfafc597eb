"""medusa demo: plain decoding and Medusa side by side, then the figures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa.cli import common
from medusa.errors import InvalidInput

# One colour a step, in turn: a run of one colour is what one step emitted.
COLOURS = ("bright_cyan", "bright_yellow", "bright_green", "bright_magenta", "bright_blue", "bright_red")


def demo_command(
    model: common.ModelArgument = "embedded",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Your own prompt (default: held-out code).")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", "-f", help="Read the prompt from a file.")] = None,
    heads: common.HeadsOption = None,
    tree: common.TreeOption = None,
    max_new_tokens: common.MaxNewTokens = 192,
    prompts: Annotated[int, typer.Option("--prompts", help="Held-out prompts measured (with the embedded model).")] = 6,
    gguf_file: common.GgufOption = None,
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile our loops: a slow start, then faster.")
    ] = True,
    check_float32: Annotated[
        bool, typer.Option("--float32-check/--no-float32-check", help="Compare outputs in float32 too.")
    ] = True,
    svg: Annotated[Path | None, typer.Option("--svg", help="Save a picture of the result here.")] = None,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Show the same completion decoded plainly and with Medusa, and measure both against transformers' generate."""
    model = common.with_file(model, gguf_file, revision)
    if prompts < 1:
        raise InvalidInput(f"--prompts is {prompts}, wanted at least 1")
    own = prompt is not None or prompt_file is not None
    if not own and model != "embedded":
        raise InvalidInput("no prompt; pass --prompt or --prompt-file (held-out prompts ship with `embedded` alone)")
    from rich.console import Console

    tokenizer = common.load_tokenizer(model, trust_remote_code)
    if own:
        batches = [common.encode(tokenizer, common.read_prompt(prompt, prompt_file))]
    else:
        from medusa.evaluation.prompts import held_out_prompts

        found = held_out_prompts()
        batches = [found[i * len(found) // prompts].ids[None] for i in range(min(prompts, len(found)))]
    loaded = common.load_model(model, heads, tree, dtype, device, trust_remote_code)
    console = Console(stderr=as_json)
    record, recorded = _measure(loaded, batches, max_new_tokens, compile, console)
    if check_float32:
        record["identical_float32"] = _identical_in_float32(
            model, heads, tree, device, trust_remote_code, loaded, record["identical"], batches, max_new_tokens
        )
    text = tokenizer.decode(recorded["medusa"].tokens())
    record["text"] = text
    table = _table(record, len(batches), max_new_tokens, loaded)
    if svg is not None:
        _save_picture(svg, tokenizer, recorded, table)
    if as_json:
        print(json.dumps(record))
        return
    if console.is_terminal:
        _replay(console, tokenizer, recorded)
    else:
        console.print(_side_by_side(tokenizer, recorded, None))
    console.print(table)


class _Recording:
    """When each step of a run came, and its tokens."""

    def __init__(self, prompt: list[int], steps: list[tuple[float, list[int]]]):
        self.prompt = prompt
        self.steps = steps

    def tokens(self) -> list[int]:
        return [token for _, tokens in self.steps for token in tokens]


def _measure(model, batches, max_new_tokens: int, compile: bool, console) -> tuple[dict[str, Any], dict[str, _Recording]]:
    from rich.progress import Progress

    from medusa.evaluation.compare import compare, overhead
    from medusa.evaluation.decoders import Decoder, MedusaDecoder, TransformersDecoder
    from medusa.evaluation.quality import repeated_ngrams
    from medusa.tree import MedusaTree

    root = MedusaTree([])
    decoders: dict[str, Decoder] = {
        "generate": TransformersDecoder(model, max_new_tokens),
        "plain": MedusaDecoder(model, max_new_tokens, root, compile=compile),
        "medusa": MedusaDecoder(model, max_new_tokens, compile=compile),
    }
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling, then measuring" if compile else "measuring", total=len(batches) * len(decoders))
        results = compare(decoders, batches, on_progress=lambda: progress.advance(task))
    # The text shown is the one that repeats itself least: repetition flatters every speculative method.
    outputs = [rows[0] for rows in results["generate"].outputs]
    shown = batches[min(range(len(batches)), key=lambda i: repeated_ngrams(outputs[i]))]
    recorded = {}
    for name, tree in (("plain", root), ("medusa", None)):
        start = time.perf_counter()
        steps = [
            (time.perf_counter() - start, step.tokens[0])
            for step in model.stream(
                shown, shown.new_ones(shown.shape), max_new_tokens=max_new_tokens, do_sample=False, tree=tree, compile=compile
            )
        ]
        recorded[name] = _Recording(shown[0].tolist(), steps)
    generate, plain, medusa = (results[name] for name in decoders)
    record: dict[str, Any] = {
        "generate": {"tokens_per_second": generate.tokens_per_second},
        "plain": {"tokens_per_second": plain.tokens_per_second},
        "medusa": {
            "tokens_per_second": medusa.tokens_per_second,
            "acceleration_rate": medusa.acceleration_rate,
            "overhead": float(overhead(medusa.totals(), plain.totals())),
        },
        "speedup_vs_generate": medusa.tokens_per_second / generate.tokens_per_second,
        "speedup_vs_plain": medusa.tokens_per_second / plain.tokens_per_second,
        "identical": generate.outputs == plain.outputs == medusa.outputs,
        "compiled": compile,
    }
    return record, recorded


def _identical_in_float32(
    name, heads, tree, device, trust_remote_code, loaded, identical: bool, batches, max_new_tokens: int
) -> bool:
    """Whether generate, the plain loop and Medusa say the same on these prompts in float32, where they must."""
    import torch

    from medusa.evaluation.decoders import Decoder, MedusaDecoder, TransformersDecoder
    from medusa.tree import MedusaTree

    if loaded.backbone.dtype == torch.float32:
        return identical
    exact = common.load_model(name, heads, tree, "float32", device, trust_remote_code)
    decoders: list[Decoder] = [
        TransformersDecoder(exact, max_new_tokens),
        MedusaDecoder(exact, max_new_tokens, MedusaTree([])),
        MedusaDecoder(exact, max_new_tokens),
    ]
    return all(len({str(decode(batch).tokens) for decode in decoders}) == 1 for batch in batches)


def _panel(tokenizer, name: str, recording: _Recording, at: float | None):
    """The text that a run had emitted at a time (None: at its end), coloured by step."""
    from rich.panel import Panel
    from rich.text import Text

    from medusa.text import Detokenizer

    detokenizer = Detokenizer(tokenizer, recording.prompt)
    text, shown, tokens = Text(), 0, 0
    for number, (when, step) in enumerate(recording.steps):
        if at is not None and when > at:
            break
        text.append(detokenizer.put(step), style=COLOURS[number % len(COLOURS)])
        shown, tokens = number + 1, tokens + len(step)
    return Panel(text, title=name, subtitle=f"{tokens} tokens in {shown} steps", height=None)


def _side_by_side(tokenizer, recorded: dict[str, _Recording], at: float | None):
    from rich.table import Table

    grid = Table.grid(expand=True)
    for _ in recorded:
        grid.add_column(ratio=1)
    grid.add_row(*(_panel(tokenizer, name, recording, at) for name, recording in recorded.items()))
    return grid


def _replay(console, tokenizer, recorded: dict[str, _Recording]) -> None:
    """Show both runs at once, each at the pace at which it ran alone."""
    from rich.live import Live

    end = max(recording.steps[-1][0] for recording in recorded.values())
    with Live(console=console, refresh_per_second=20, vertical_overflow="crop") as live:
        start = time.perf_counter()
        while (at := time.perf_counter() - start) < end:
            live.update(_side_by_side(tokenizer, recorded, at))
            time.sleep(0.05)
        live.vertical_overflow = "visible"
        live.update(_side_by_side(tokenizer, recorded, None), refresh=True)


def _save_picture(path: Path, tokenizer, recorded: dict[str, _Recording], table) -> None:
    """Both runs at the moment when Medusa had finished, and the figures, as SVG."""
    import io

    from rich.console import Console

    screen = Console(record=True, width=150, file=io.StringIO())
    screen.print(_side_by_side(tokenizer, recorded, recorded["medusa"].steps[-1][0]))
    screen.print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    screen.save_svg(str(path), title="medusa demo")


def _table(record: dict[str, Any], prompts: int, max_new_tokens: int, model):
    from rich.table import Table

    dtype = str(model.backbone.dtype).removeprefix("torch.")
    compiled = ", ours compiled" if record["compiled"] else ""
    title = f"{prompts} prompts, {max_new_tokens} new tokens, greedy, {dtype}, {len(model.tree)} nodes{compiled}"
    table = Table(title=title, title_justify="left")
    for column in ("", "tokens/s", "tokens a step", "overhead", "speedup"):
        table.add_column(column, justify="left" if not column else "right")
    base = record["generate"]["tokens_per_second"]
    for name, label in (("generate", "transformers generate"), ("plain", "our plain loop"), ("medusa", "Medusa")):
        part = record[name]
        table.add_row(
            label,
            f"{part['tokens_per_second']:.1f}",
            f"{part['acceleration_rate']:.2f}" if "acceleration_rate" in part else "1.00",
            f"{part['overhead']:.2f}" if "overhead" in part else "",
            f"{part['tokens_per_second'] / base:.2f}x",
        )
    same = "yes" if record["identical"] else "no: rounding in this dtype breaks ties differently"
    table.caption = f"identical output: {same}"
    if "identical_float32" in record:
        table.caption += f"\nidentical output in float32: {'yes' if record['identical_float32'] else 'NO'}"
    return table
