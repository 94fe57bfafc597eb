"""medusa demo: an answer shown as it is decoded, plainly and then with Medusa; then the speeds."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, prompting, showing
from medusa.config import option
from medusa.errors import InvalidInput
from medusa.runs.console import note, progress, waiting

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from medusa.model import MedusaModel

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="The backbone: a folder, GGUF file or hub id, `smollm2` (default where it is installed) or `embedded`.",
        show_default=False,
    ),
]
# One colour per step, in turn: tokens of one colour were emitted by one step.
COLOURS = ("bright_cyan", "bright_yellow", "bright_green", "bright_magenta", "bright_blue", "bright_red")
QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "What are the steps to bake a simple loaf of bread?",
    "Write a polite email that asks a colleague to move a meeting to Friday.",
    "Give me five tips for learning a new language.",
    "Tell me a short story about a lighthouse keeper who finds a message in a bottle.",
)
SHOWN_LINES = 6  # number of last lines of the prompt to show, if it is code to continue
FIRST_SHOWN = 12  # index of the first held-out prompt: a text that repeats itself little


@dataclass(frozen=True)
class Demonstration:
    """What is measured, and where the result is saved."""

    limit: int = option(3, "Number of built-in prompts to measure.", least=1)
    compile: bool = option(True, "Compile the steps of our loops (slow start).")
    float32_check: bool = option(True, "Also compare the outputs in float32.")
    svg: Path | None = option(None, "Save a picture of the result to this file.")
    html: Path | None = option(None, "Save the run as a page that replays it and shows its trees.")


@common.with_options(Demonstration, common.Loading)
def demo_command(
    model: ModelArgument = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Prompt to use (default: built-in questions, or held-out code).")
    ] = None,
    prompt_file: common.PromptFileOption = None,
    chat: common.ChatOption = None,
    tree: common.TreeOption = None,
    max_new_tokens: common.MaxNewTokens = 192,
    as_json: common.JsonOption = False,
    **options: Any,
) -> None:
    """Show an answer being decoded, first plainly and then with Medusa; then measure both against transformers' generate."""
    if model is not None:
        prompting.refuse_prompt_as_model(model, "give it with --prompt")
    given = prompting.read_prompt(prompt, prompt_file) if prompt is not None or prompt_file is not None else None
    model = common.full_name(model or _default_model(options["heads"]), options)
    out, wanted = showing.console(stderr=as_json), common.take(Demonstration, options)
    demo = _load(model, tree, given, chat, wanted.limit, max_new_tokens, **options)
    recorded = _watch(demo, wanted.compile, out)
    record = _measure(demo, wanted.compile) | {"model": model}
    if wanted.float32_check:
        record["identical_float32"] = _identical_in_float32(demo, tree, record["identical"], **options)
    record["text"] = demo.tokenizer.decode(recorded["medusa"].tokens(), skip_special_tokens=True)
    header, rows, title, caption = _table(record, len(demo.batches), max_new_tokens, demo.model)
    if wanted.svg is not None:
        _save_picture(wanted.svg, demo.tokenizer, recorded, showing.tables(150, header, rows, title, caption))
    if wanted.html is not None:
        _save_page(wanted.html, demo, recorded)
    if as_json:
        print(json.dumps(record))
        return
    out.print(title)
    showing.print_table(header, rows)
    out.print(caption)


@dataclass(frozen=True)
class _Demo:
    """The model, and the prompts as texts and as token ids (1, P)."""

    name: str
    model: MedusaModel
    tokenizer: Any
    is_chat: bool
    texts: list[str]
    batches: list[Tensor]
    limits: dict[str, Any]  # options of every decoder: `max_new_tokens`, and the ids that end an answer


def _load(
    name: str, tree: str | None, given: str | None, chat: bool | None, number: int, max_new_tokens: int, **options: Any
) -> _Demo:
    """Load what is to be shown; prompts that do not fit are refused before that."""
    from medusa.checkpoints import named
    from medusa.data.prompts import as_conversation

    trusted = options["trust_remote_code"]
    named.require_heads(name, options["heads"], tree == "root")
    tokenizer = named.load_tokenizer(name, trusted)
    is_chat = as_conversation(tokenizer, "", chat, name) is not None
    texts, batches = _prompts(name, tokenizer, given, is_chat, number)
    named.check_room(name, max(batch.shape[1] for batch in batches), max_new_tokens, trusted)
    model = named.load_model(name, tree=tree, **options)
    named.note_advice_on_tree(model, name, options["heads"], tree)
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if is_chat:
        limits["eos_token_id"] = sorted({*model.eos_token_ids, tokenizer.eos_token_id} - {None})
    return _Demo(name, model, tokenizer, is_chat, texts, batches, limits)


def _default_model(heads: str | None) -> str:
    """SmolLM2 if it is installed and has heads; else the embedded model, with a note."""
    from medusa.checkpoints.hub import local_model
    from medusa.checkpoints.reader import has_heads

    found = local_model("smollm2") if importlib.util.find_spec("gguf") is not None else None
    if found is not None and (heads is not None or (found.heads is not None and has_heads(found.heads))):
        return "smollm2"
    missing = "heads of smollm2 are" if found is not None else "smollm2 is"
    note(f"{missing} not installed here, so the demo uses `embedded`, a small code model")
    return "embedded"


def _prompts(model: str, tokenizer: Any, given: str | None, is_chat: bool, number: int) -> tuple[list[str], list[Tensor]]:
    """The prompts as texts and as token ids (1, P): the given one, our questions, or held-out code."""
    import torch

    from medusa.data.prompts import as_conversation, prompt_ids

    if given is None and model == "embedded":
        from medusa.data.prompt_sets import held_out_prompts

        found = held_out_prompts()
        chosen = [found[(FIRST_SHOWN + i * len(found) // number) % len(found)] for i in range(min(number, len(found)))]
        return [tokenizer.decode(each.ids) for each in chosen], [each.ids[None] for each in chosen]
    if given is None and not is_chat:
        raise InvalidInput(f"{model} is not a chat model, which could answer our questions; pass --prompt or --prompt-file")
    texts = list(QUESTIONS[:number]) if given is None else [given]
    asked = [as_conversation(tokenizer, text, is_chat, model) or text for text in texts]
    return texts, [torch.tensor([prompt_ids(tokenizer, prompt)]) for prompt in asked]


def _watch(demo: _Demo, compile: bool, out: Console) -> dict[str, _Recording]:
    """Decode one prompt plainly and then with Medusa, showing the text as it is generated."""
    from rich.text import Text

    from medusa.evaluation.decoders import MedusaDecoder
    from medusa.generation.text import Detokenizer
    from medusa.trees.static import MedusaTree

    model, ids = demo.model, demo.batches[0]
    options: dict[str, Any] = {"compile": compile, **demo.limits}
    trees = {"plain": MedusaTree([]), "medusa": model.tree}
    if compile:
        with waiting("compiling, once: a minute or two"):
            for tree in trees.values():
                MedusaDecoder(model, tree=tree, **options).prepare(ids)
    asked = f"> {demo.texts[0]}" if demo.is_chat else "\n".join(["…", *demo.texts[0].splitlines()[-SHOWN_LINES:]])
    out.print(Text(asked, style="bold" if demo.is_chat else "dim"))
    titles = {"plain": "plainly: one token per step", "medusa": "with Medusa: tokens of one step have one colour"}
    recorded = {}
    for name, tree in trees.items():
        out.print(Text(f"\n{titles[name]}\n", style="dim"))
        steps: list[tuple[float, list[int]]] = []
        detokenizer, words = Detokenizer(demo.tokenizer, ids[0].tolist()), showing.Words(out)
        start = time.perf_counter()
        for step in model.stream(ids, ids.new_ones(ids.shape), do_sample=False, tree=tree, **options):
            steps.append((time.perf_counter() - start, step.tokens[0]))
            colour = COLOURS[len(steps) % len(COLOURS)] if name == "medusa" else None
            words.put(detokenizer.put(step.tokens[0]), colour)
        words.put(detokenizer.end())
        words.end()
        recorded[name] = _Recording(ids[0].tolist(), steps)
        tokens, seconds = len(recorded[name].tokens()), time.perf_counter() - start
        out.print(Text(f"\n{tokens} tokens in {seconds:.1f} s: {showing.speed(tokens, len(steps), seconds)}", style="bold"))
    if recorded["plain"].tokens() != recorded["medusa"].tokens():
        why = "The texts differ where two tokens are almost equally likely and rounding decides; not in float32."
        out.print(Text(f"\n{why}", style="dim"))
    out.print()
    return recorded


@dataclass(frozen=True)
class _Recording:
    """The steps of a run: the time of each, and its tokens."""

    prompt: list[int]
    steps: list[tuple[float, list[int]]]

    def tokens(self) -> list[int]:
        return [token for _, tokens in self.steps for token in tokens]


def _measure(demo: _Demo, compile: bool) -> dict[str, Any]:
    from medusa.evaluation.decoders import Decoder, MedusaDecoder, TransformersDecoder
    from medusa.evaluation.measurement import compare_decoders, overhead
    from medusa.trees.static import MedusaTree

    model, batches, limits = demo.model, demo.batches, demo.limits
    decoders: dict[str, Decoder] = {
        "generate": TransformersDecoder(model, **limits),
        "plain": MedusaDecoder(model, tree=MedusaTree([]), compile=compile, **limits),
        "medusa": MedusaDecoder(model, compile=compile, **limits),
    }
    TransformersDecoder(model, **{**limits, "max_new_tokens": 2})(batches[0])  # warm-up; our loops have run before
    with progress("Measuring", len(batches) * len(decoders), "runs", leave=False) as bar:
        results = compare_decoders(decoders, batches, warmup=0, on_progress=bar.update)
    generate, plain, medusa = (results[name] for name in decoders)
    gains = {"acceleration_rate": medusa.acceleration_rate, "overhead": float(overhead(medusa.totals(), plain.totals()))}
    return {
        "generate": {"tokens_per_second": generate.tokens_per_second},
        "plain": {"tokens_per_second": plain.tokens_per_second},
        "medusa": {"tokens_per_second": medusa.tokens_per_second, **gains},
        "speedup_vs_generate": medusa.tokens_per_second / generate.tokens_per_second,
        "speedup_vs_plain": medusa.tokens_per_second / plain.tokens_per_second,
        "identical": generate.outputs == plain.outputs == medusa.outputs,
        "identical_to_plain": plain.outputs == medusa.outputs,
        "compiled": compile,
    }


def _identical_in_float32(demo: _Demo, tree: str | None, identical: bool, **options: Any) -> bool:
    """Whether generate, the plain loop and Medusa give the same output on one prompt in float32, as they must."""
    import torch

    from medusa.checkpoints import named
    from medusa.evaluation.decoders import Decoder, MedusaDecoder, TransformersDecoder
    from medusa.trees.static import MedusaTree

    if demo.model.backbone.dtype == torch.float32:
        return identical
    exact = named.load_model(demo.name, tree=tree, **{**options, "dtype": "float32"})
    decoders: list[Decoder] = [
        TransformersDecoder(exact, **demo.limits),
        MedusaDecoder(exact, tree=MedusaTree([]), **demo.limits),
        MedusaDecoder(exact, **demo.limits),
    ]
    with waiting("comparing the three in float32"):
        return len({str(decode(demo.batches[0]).tokens) for decode in decoders}) == 1


def _save_picture(path: Path, tokenizer, recorded: dict[str, _Recording], tables: list[Any]) -> None:
    """Save both runs at the moment when Medusa had finished, and the speeds, as SVG."""
    import io

    from rich.console import Console
    from rich.table import Table

    grid = Table.grid(expand=True)
    for _ in recorded:
        grid.add_column(ratio=1)
    end = recorded["medusa"].steps[-1][0]
    grid.add_row(*(_panel(tokenizer, name, recording, end) for name, recording in recorded.items()))
    screen = Console(record=True, width=150, file=io.StringIO())
    screen.print(grid)
    screen.print(*tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    screen.save_svg(str(path), title="medusa demo")


def _save_page(path: Path, demo: _Demo, recorded: dict[str, _Recording]) -> None:
    """Save both runs, and the trees of Medusa's, as one HTML file."""
    from medusa.cli.recorded_page import recorded_page
    from medusa.runs.files import write_text

    runs = {name: recording.steps for name, recording in recorded.items()}
    ids = recorded["medusa"].prompt
    write_text(path, recorded_page(demo.model, demo.tokenizer, demo.name, demo.texts[0], ids, runs, demo.limits))


def _panel(tokenizer, name: str, recording: _Recording, at: float):
    """The text that a run had emitted at a time in seconds, coloured by step."""
    from rich.panel import Panel
    from rich.text import Text

    from medusa.generation.text import Detokenizer

    detokenizer, text = Detokenizer(tokenizer, recording.prompt), Text()
    shown = [step for when, step in recording.steps if when <= at]
    for number, step in enumerate(shown):
        text.append(detokenizer.put(step), style=COLOURS[number % len(COLOURS)])
    return Panel(text, title=name, subtitle=f"{sum(map(len, shown))} tokens in {len(shown)} steps", height=None)


def _table(
    record: dict[str, Any], prompts: int, max_new_tokens: int, model: MedusaModel
) -> tuple[list[str], list[list[str]], str, str]:
    dtype = str(model.backbone.dtype).removeprefix("torch.")
    title = (
        f"{prompts} prompt{'s' if prompts > 1 else ''}, at most {max_new_tokens} new tokens, greedy, {dtype}, "
        f"{len(model.tree)} nodes{', ours compiled' if record['compiled'] else ''}"
    )
    rows = []
    base = record["generate"]["tokens_per_second"]
    for name, label in (("generate", "transformers generate"), ("plain", "our plain loop"), ("medusa", "Medusa")):
        speed, rate, overhead = (record[name].get(key) for key in ("tokens_per_second", "acceleration_rate", "overhead"))
        cells = [f"{speed:.1f}", f"{rate or 1:.2f}", "" if overhead is None else f"{overhead:.2f}", f"{speed / base:.2f}x"]
        rows.append([label, *cells])
    caption = f"same output as the plain loop: {'yes' if record['identical_to_plain'] else 'no'}"
    caption += f"\nas transformers: {'yes' if record['identical'] else 'no, rounding in this dtype breaks ties differently'}"
    if "identical_float32" in record:
        caption += f"\nidentical output in float32: {'yes' if record['identical_float32'] else 'NO'}"
    return ["", "tokens/s", "tokens per step", "overhead", "speedup"], rows, title, caption
