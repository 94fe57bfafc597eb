"""Whether the promises of `medusa tune` hold on other prompts, and whether the tree it chooses is the fastest.

    python benchmarks/tuning.py [--prompts FILE.jsonl] [--parts rates speed] [--json results/tuning.json]

The prompts are dealt into two halves; trees are searched on the first and decode the second. *Rates*: tokens per step as
expected from the calibration in three ways (head accuracies as if independent, the paper's 2.3.3; paths that came true
together, averaged over all places; replay of the recorded texts) against those decoded. *Speed*: every kind and size decodes,
in turn; the choice of `tune`, which never saw these prompts, beside the fastest. On the embedded model, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging

from medusa import EMBEDDED, MedusaModel, MedusaTree
from medusa.data.prompt_sets import held_out_prompts
from medusa.evaluation.decoders import Decoder, MedusaDecoder
from medusa.evaluation.measurement import Estimate, Totals, compare_decoders, estimate
from medusa.evaluation.report import interval_text
from medusa.runs.provenance import environment
from medusa.trees.calibration import Calibration
from medusa.tuning.choice import choose_trees
from medusa.tuning.options import TREE_KINDS, Option, Trees
from medusa.tuning.recording import Recorded, record
from medusa.tuning.replay import replay_texts
from medusa.tuning.timing import time_steps

NODES = (2, 4, 6, 8, 12, 16, 24, 32, 48)
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="JSON lines with input_ids (default: the shipped held-out prompts)")
    parser.add_argument("--parts", nargs="+", choices=("rates", "speed"), default=["rates", "speed"])
    parser.add_argument("--kinds", nargs="+", choices=TREE_KINDS, default=list(TREE_KINDS))
    parser.add_argument("--nodes", nargs="+", type=int, default=list(NODES), help="tree sizes whose speed is measured")
    parser.add_argument("--rate-nodes", nargs="+", type=int, default=[8, 16], help="tree sizes whose rate is measured")
    parser.add_argument("--timed", type=int, default=16, help="number of prompts that every tree decodes for speed")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.timed < 2:
        parser.error(f"--timed is {args.timed}, expected at least 2: one prompt gives no interval")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = MedusaModel.from_pretrained(EMBEDDED, dtype=torch.bfloat16)
    calibrating, others = halves(args.prompts)
    sampling = {"do_sample": True, "temperature": args.temperature, "seed": 1} if args.temperature else {}
    console, found = Console(), {"environment": environment(model.device), "prompts": [len(calibrating), len(others)]}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("recording", total=len(calibrating))
        texts = record(
            model,
            calibrating,
            args.new_tokens,
            temperature=args.temperature,
            batch_size=BATCH,
            on_progress=lambda done: progress.advance(task, done),
        )
        trees = Trees(texts)
        if "rates" in args.parts:
            found["rates"] = rates(model, texts, trees, others, sampling, args, progress)
        if "speed" in args.parts:
            found["speed"] = speed(model, texts, trees, others, sampling, args, progress)
    console.print(f"{len(calibrating)} prompts for calibration, {len(others)} others; at most {args.new_tokens} new tokens")
    show(console, found)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def halves(path: Path | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The prompts in two random halves, always the same ones."""
    if path is None:
        prompts = [prompt.ids for split in ("calibration", "test") for prompt in held_out_prompts(split)]
    else:
        prompts = [torch.tensor(json.loads(line)["input_ids"]) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(prompts)
    return prompts[::2], prompts[1::2]


def rates(
    model: MedusaModel,
    texts: list[Recorded],
    trees: Trees,
    prompts: list[torch.Tensor],
    sampling: dict,
    args: argparse.Namespace,
    progress: Progress,
) -> list[dict]:
    """Tokens per step of each tree, as expected and as decoded on other prompts."""
    calibration = Calibration.of(texts)
    tried = [trees.option(kind, size) for kind in args.kinds for size in args.rate_nodes]
    decoders: dict[str, Decoder] = {
        option.name: MedusaDecoder(model, args.new_tokens, option.tree, eos_token_id=[], **sampling) for option in tried
    }
    batches = [torch.stack(prompts[at : at + BATCH]) for at in range(0, len(prompts), BATCH)]
    task = progress.add_task("decoding, for rates", total=len(decoders) * len(batches))
    measured = compare_decoders(decoders, batches, warmup=0, on_progress=lambda: progress.advance(task))
    rows = []
    for option in tried:
        average = None
        if isinstance(option.tree, MedusaTree):
            counts = dict(calibration.paths)
            average = 1 + sum(counts.get(path, 0) for path in option.tree.paths) / calibration.positions
        each = measured[option.name]
        rows.append(
            {
                "tree": option.name,
                "decoded": each.acceleration_rate,
                "independent": option.if_independent,
                "joint average": average,
                "replayed": replay_texts(texts, option.tree).acceleration_rate,
                "cross-validated": option.acceleration_rate,
                "interval": list(option.interval),
            }
        )
    return rows


def speed(
    model: MedusaModel,
    texts: list[Recorded],
    trees: Trees,
    prompts: list[torch.Tensor],
    sampling: dict,
    args: argparse.Namespace,
    progress: Progress,
) -> dict:
    """The speed that tune promises for every tree, its choice, and the speed of each tree on other prompts."""
    ids = texts[0].ids[None, : texts[0].start + 1]
    task = progress.add_task("timing steps", total=None)

    def timed(tried, rows: int) -> list[float]:
        return time_steps(model, tried, ids.expand(rows, -1), on_progress=lambda: progress.advance(task), **sampling)

    tuned = choose_trees(trees, timed, args.kinds, args.nodes)
    choice = tuned.chosen[1]
    every = {option.tree: option for option in [tuned.plain, *tuned.options, *tuned.by_depth]}
    chosen = prompts[:: max(1, len(prompts) // args.timed)][: args.timed]
    decoders: dict[str, Decoder] = {
        option.name: MedusaDecoder(model, args.new_tokens, tree, eos_token_id=[], **sampling) for tree, option in every.items()
    }
    task = progress.add_task("decoding, for speed", total=len(decoders) * len(chosen) * args.rounds)
    measured = compare_decoders(
        decoders, [ids[None] for ids in chosen], args.rounds, on_progress=lambda: progress.advance(task)
    )

    def ratio(name: str, base: str) -> Estimate:
        def figure(a: Totals, b: Totals) -> torch.Tensor:
            return a.decode_tokens_per_second / b.decode_tokens_per_second

        return estimate(figure, measured[name], measured[base])

    def row(option: Option) -> dict:
        return {
            "tree": option.name,
            "promised": option.tokens_per_second(1) / tuned.plain.tokens_per_second(1),
            "speedup": ratio(option.name, "plain"),
            "tokens per step": measured[option.name].acceleration_rate,
        }

    rows = [row(option) for option in every.values()]
    best = max(rows, key=lambda row: row["speedup"].value)["tree"]
    return {"rows": rows, "chosen": choice.name, "best": best, "chosen over best": ratio(choice.name, best)}


def show(console: Console, found: dict) -> None:
    def beside(value: float | None, decoded: float) -> str:
        return "" if value is None else f"{value:.3f} ({100 * (value / decoded - 1):+.1f} %)"

    if "rates" in found:
        ways = ("independent", "joint average", "replayed", "cross-validated")
        table = Table("tree", "decoded", *ways, title="tokens per step")
        for row in found["rates"]:
            table.add_row(row["tree"], f"{row['decoded']:.3f}", *(beside(row[way], row["decoded"]) for way in ways))
        console.print(table)
    if "speed" in found:
        table = Table("tree", "promised", "measured", "tokens per step", title="times plain decoding, the prefill left out")
        for row in found["speed"]["rows"]:
            style = "bold" if row["tree"] == found["speed"]["chosen"] else None
            table.add_row(
                row["tree"],
                f"{row['promised']:.2f}",
                interval_text(row["speedup"]),
                f"{row['tokens per step']:.2f}",
                style=style,
            )
        console.print(table)
        ratio = interval_text(found["speed"]["chosen over best"], ".3f")
        console.print(f"chosen: {found['speed']['chosen']}, {ratio} times as fast as {found['speed']['best']}")


if __name__ == "__main__":
    main()
