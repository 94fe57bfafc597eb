"""Decoding speed of the embedded model: transformers' generate, our plain loop and Medusa, compared in one run.

    python benchmarks/decode.py [--quick] [--compiled] [--json results/decode.json]

Held-out prompts of 256 tokens; greedy and sampled at temperature 0.8; float32 and bfloat16; batches of 1, 4 and 16. Every
decoder gets the same prompts in turn, and emits the same number of tokens; seconds include the prefill.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging

from medusa import EMBEDDED, MedusaModel, MedusaTree, __version__, load_tree
from medusa.config import TREE_FILE
from medusa.data.prompt_sets import held_out_prompts
from medusa.evaluation.decoders import Decoder, MedusaDecoder, TransformersDecoder
from medusa.evaluation.measurement import compare_decoders, overhead
from medusa.evaluation.quality import repeated_ngrams
from medusa.trees.files import Tree
from medusa.trees.search import search_joint_tree

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One comparison."""

    dtype: str
    batch: int
    temperature: float
    compiled: bool


def settings(args: argparse.Namespace) -> list[Setting]:
    """All settings for batch 1; larger batches only greedily and uncompiled."""
    found = []
    for dtype in args.dtypes:
        for batch in args.batches:
            for temperature in (0.0, 0.8) if batch == 1 else (0.0,):
                found.append(Setting(dtype, batch, temperature, compiled=False))
        if args.compiled:
            found.append(Setting(dtype, 1, 0.0, compiled=True))
    return found


def run(setting: Setting, model: MedusaModel, trees: dict[str, Tree], args: argparse.Namespace, on_progress) -> dict:
    """Measure one setting; a row per decoder."""
    prompts = [prompt.ids for prompt in held_out_prompts()]
    count = max(args.prompts, setting.batch)
    prompts = prompts[:: max(1, len(prompts) // count)][:count]
    batches = [torch.stack(prompts[i : i + setting.batch]) for i in range(0, len(prompts), setting.batch)]
    batches = [batch for batch in batches if len(batch) == setting.batch]
    sampled = setting.temperature > 0
    ours = {"do_sample": True, "temperature": setting.temperature, "seed": 1} if sampled else {}
    theirs = {"do_sample": True, "temperature": setting.temperature, "top_k": 0} if sampled else {}
    decoders: dict[str, Decoder] = {"generate": TransformersDecoder(model, args.new_tokens, **theirs)}
    for name, tree in trees.items():
        decoders[name] = MedusaDecoder(model, args.new_tokens, tree, compile=setting.compiled, **ours)
    results = compare_decoders(decoders, batches, args.rounds, on_progress=on_progress)
    plain, generate = results["plain"], results["generate"]
    rows = {}
    for name, measured in results.items():
        outputs = [row for rows_ in measured.outputs for row in rows_]
        row = {
            "tokens_per_second": measured.tokens_per_second,
            "speedup_vs_generate": measured.tokens_per_second / generate.tokens_per_second,
            "speedup_vs_plain": measured.tokens_per_second / plain.tokens_per_second,
            "repeated_8grams": sum(map(repeated_ngrams, outputs)) / len(outputs),
            "acceleration_rate": measured.acceleration_rate,
            "overhead": float(overhead(measured.totals(), plain.totals())),
        }
        # When sampling, transformers draws from another random stream; our plain loop and Medusa share theirs.
        against = plain if sampled else generate
        wanted = [row_ for rows_ in against.outputs for row_ in rows_]
        row["identical_outputs"] = sum(a == b for a, b in zip(outputs, wanted, strict=True)) / len(wanted)
        if not sampled:
            row["gaps_where_outputs_part"] = gaps_where_outputs_part(model, prompts, outputs, wanted)
        rows[name] = row
    return {**dataclasses.asdict(setting), "prompts": len(batches) * setting.batch, "decoders": rows}


@torch.inference_mode()
def gaps_where_outputs_part(model: MedusaModel, prompts: list, outputs: list, wanted: list) -> list[float]:
    """Why outputs differ: for each prompt where they do, the distance of the two tokens' logits at the first difference, in
    rounding steps of the dtype at that magnitude. A few steps are a near-tie that rounding decides."""
    gaps = []
    for prompt, a, b in zip(prompts, outputs, wanted, strict=False):
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if place is not None:
            ids = torch.cat([prompt, torch.tensor(a[:place], dtype=torch.long)])[None]
            logits = model.logits(model.hidden_states(ids.to(model.device)))[0, -1].float()
            largest = logits[[a[place], b[place]]].abs().max()
            spacing = torch.finfo(model.backbone.dtype).eps * 2.0 ** largest.log2().floor()
            gaps.append(float((logits[a[place]] - logits[b[place]]).abs() / spacing))
    return gaps


def show(result: dict, console: Console) -> None:
    kind = f"sampled at {result['temperature']}" if result["temperature"] else "greedy"
    compiled = ", ours compiled" if result["compiled"] else ""
    table = Table(title=f"{result['dtype']}, batch {result['batch']}, {kind}{compiled}", title_justify="left")
    columns = ("", "tokens/s", "vs generate", "vs plain", "tokens per step", "overhead", "identical", "repeated 8-grams")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["decoders"].items():
        table.add_row(
            name,
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup_vs_generate']:.2f}",
            f"{row['speedup_vs_plain']:.2f}",
            f"{row['acceleration_rate']:.2f}",
            f"{row['overhead']:.2f}",
            f"{row['identical_outputs']:.0%}",
            f"{row['repeated_8grams']:.0%}",
        )
    console.print(table)
    gaps = [gap for row in result["decoders"].values() for gap in row.get("gaps_where_outputs_part", [])]
    if gaps:
        console.print(f"where greedy outputs diverge, the two tokens' logits are at most {max(gaps):.0f} roundings apart\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=[*DTYPES], choices=[*DTYPES])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--nodes", nargs="*", type=int, default=[8, 16, 32], help="sizes of static trees, the root included")
    parser.add_argument("--tree", nargs="*", type=Path, default=[], help="other tree files, besides the shipped one")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also measure our loops compiled (slow to start)")
    parser.add_argument("--heads", type=Path, help="other heads, with their calibration.json [the embedded model's]")
    parser.add_argument("--quick", action="store_true", help="4 prompts, batch 1, one round")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.batches, args.rounds = 4, [1], 1

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(stderr=True)
    paths = json.loads(((args.heads or EMBEDDED) / "calibration.json").read_text())["paths"]
    trees: dict[str, Tree] = {"plain": MedusaTree([])}
    trees |= {f"static {nodes}": search_joint_tree(paths, nodes) for nodes in args.nodes}
    trees |= {path.stem: load_tree(path) for path in [EMBEDDED / TREE_FILE, *args.tree]}
    results = []
    with Progress(console=console, transient=True) as progress:
        todo = settings(args)
        models = {dtype: MedusaModel.from_pretrained(EMBEDDED, args.heads, dtype=DTYPES[dtype]) for dtype in args.dtypes}
        for setting in todo:
            name = f"{setting.dtype}, batch {setting.batch}, T {setting.temperature}{', compiled' * setting.compiled}"
            task = progress.add_task(name, total=None)
            results.append(
                run(setting, models[setting.dtype], trees, args, on_progress=lambda task=task: progress.advance(task))
            )
            progress.remove_task(task)
            show(results[-1], Console(file=sys.stdout, width=120))
    if args.json:
        versions = {"medusa": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        told = {**versions, **machine, "options": vars(args), "results": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(told, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
