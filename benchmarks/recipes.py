"""What each part of the training recipe contributes: the paper's Table 2 and ablations on the embedded model.

    python benchmarks/recipes.py --data OWN.jsonl --corpus CORPUS.jsonl --work DIR [--steps 300] [--json FILE]

Every variant gets the same number of steps on rows of the same length, those of Table 2 as many again, and is measured on
the same held-out prompts: the head accuracies on its own greedy continuations, the tokens per step that its best tree then
really emits, and the loss of its backbone on held-out text beside the original's. OWN is what the backbone itself wrote
(`medusa distill`), CORPUS the text it was trained on. A variant already in DIR is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch.nn import functional as F
from transformers import AutoTokenizer
from transformers.utils import logging

from medusa import EMBEDDED, MedusaModel, MedusaTree
from medusa.checkpoints.loading import load_backbone
from medusa.checkpoints.reader import load_heads
from medusa.data.prompt_sets import held_out_prompts
from medusa.training.config import resolve
from medusa.training.data import load_rows
from medusa.training.run import train_heads
from medusa.trees.calibration import Calibration
from medusa.trees.search import search_joint_tree
from medusa.tuning.recording import record

NEW_TOKENS, BATCH = 128, 16
JOINT = {"backbone": "lora", "held_out": 0.0}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train, by its differences from plain Medusa-1."""

    name: str
    options: dict
    data: str = "own"
    start: str | None = None  # a variant whose heads it starts from


VARIANTS = (
    Variant("medusa-1", {}),
    Variant("hard targets", {"targets": "hard"}),
    Variant("lambda_k = 1", {"lambda_base": 1.0}),
    Variant("corpus data", {}, data="corpus"),
    Variant("shared LM head", {"shared_lm_head": True}),
    # Table 2. The first of the two stages is plain Medusa-1; for comparison, plain Medusa-1 for twice as many steps.
    Variant("medusa-1, twice as long", {}, start="medusa-1"),
    Variant("medusa-2, two stages", JOINT | {"lm_loss": "labels", "lambda_0": 0.2}, start="medusa-1"),
    Variant("medusa-2, two stages, distilled", JOINT | {"lm_loss": "distill", "lambda_0": 0.2}, start="medusa-1"),
    Variant(
        "direct joint training",
        JOINT | {"lm_loss": "labels", "lambda_0": 1.0, "warmup_steps": 0, "backbone_learning_rate": "learning_rate"},
        start=None,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text written by the backbone")
    parser.add_argument("--corpus", type=Path, required=True, help="text the backbone was trained on")
    parser.add_argument("--work", type=Path, required=True, help="folder for heads, hidden states and results")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=320)
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="peak, for the heads; joint training uses a third")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    data = {
        name: load_rows(path, tokenizer, args.length, 1 << 30) for name, path in (("own", args.data), ("corpus", args.corpus))
    }
    rows_needed = args.steps * args.batch_size
    for name, found in data.items():  # at most one pass, the same number of rows for all
        data[name] = dataclasses.replace(found, rows=found.rows[:: max(1, len(found) // rows_needed)][:rows_needed])

    console, results = Console(), {}
    original = MedusaModel(load_backbone(EMBEDDED, dtype=torch.bfloat16))
    base_loss = text_loss(original)
    for variant in VARIANTS:
        if args.only and variant.name not in args.only:
            continue
        folder = args.work / variant.name.replace(" ", "-").replace(",", "").replace("=", "is")
        if not (folder / "training.json").is_file():
            run(variant, folder, data[variant.data], args)
        model = MedusaModel.from_pretrained(EMBEDDED, heads=folder, tree=MedusaTree([]), dtype=torch.bfloat16)
        results[variant.name] = measure(model, args.nodes) | {"perplexity_ratio": math.exp(text_loss(model) - base_loss)}
        if variant.name == "medusa-1":
            for k in range(1, 6):
                results[f"medusa-1, K = {k}"] = measure(model, args.nodes, k) | {"perplexity_ratio": 1.0}
        show(console, variant.name, results[variant.name])
    table = Table(Column("variant", no_wrap=True), *(f"head {k}" for k in range(1, 6)), "tokens per step", "perplexity")
    for name, found in results.items():
        accuracies = [f"{row[0]:.2f}" for row in found["accuracies"]]
        rate, ratio = f"{found['acceleration_rate']:.2f}", f"{found['perplexity_ratio']:.4f}"
        table.add_row(name, *accuracies, *[""] * (5 - len(accuracies)), rate, ratio)
    console.print(f"{args.steps} steps of {args.batch_size} rows of {args.length} tokens; trees of {args.nodes} nodes, greedy")
    console.print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"base_perplexity": math.exp(base_loss), "variants": results}, indent=2) + "\n")


def run(variant: Variant, folder: Path, rows, args: argparse.Namespace) -> None:
    joint = variant.options.get("backbone", "frozen") != "frozen"
    rate = args.learning_rate / 3 if joint else args.learning_rate
    options = {
        "num_heads": 5,
        "max_steps": args.steps * (2 if joint and not variant.start else 1),
        "batch_size": args.batch_size,
        "gradient_accumulation": 1,
        "learning_rate": rate,
        "warmup_steps": args.steps // 20,
        "held_out": 0.0,
        **variant.options,
    }
    if options.get("backbone_learning_rate") == "learning_rate":
        options["backbone_learning_rate"] = rate
    config = resolve("medusa-1", options)
    start = load_heads(args.work / variant.start) if variant.start else None
    model = MedusaModel(load_backbone(EMBEDDED, dtype=torch.bfloat16), start)
    train_heads(model, rows, folder, config, hidden_states=None if joint else args.work / f"hidden-states-{variant.data}")


def measure(model: MedusaModel, nodes: int, num_heads: int | None = None) -> dict:
    """Accuracies on the model's own greedy continuations of calibration prompts, and tokens per step on others."""
    texts = record(
        model, [prompt.ids for prompt in held_out_prompts("calibration")], max_new_tokens=NEW_TOKENS, batch_size=BATCH
    )
    calibration = Calibration.of(texts)
    accuracies = calibration.accuracies[:num_heads]
    paths = [(path, count) for path, count in calibration.paths if len(path) <= len(accuracies)]
    tuned = MedusaModel(model.backbone, model.heads, search_joint_tree(paths, nodes))
    tokens = steps = 0
    for batch in torch.stack([prompt.ids for prompt in held_out_prompts()]).split(BATCH):
        output = tuned.generate(batch, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
        tokens += sum(map(sum, output.acceptance_lengths))
        steps += sum(map(len, output.acceptance_lengths))
    return {"accuracies": accuracies, "acceleration_rate": tokens / steps}


@torch.inference_mode()
def text_loss(model: MedusaModel) -> float:
    """Mean cross-entropy of the backbone on held-out text, in nats per token."""
    total = count = 0.0
    for prompt in held_out_prompts():
        hidden = model.hidden_states(prompt.ids[None])[0, :-1]
        total += F.cross_entropy(model.logits(hidden).float(), prompt.ids[1:], reduction="sum").item()
        count += len(prompt.ids) - 1
    return total / count


def show(console: Console, name: str, found: dict) -> None:
    heads = " ".join(f"{row[0]:.3f}" for row in found["accuracies"])
    rate, ratio = found["acceleration_rate"], found["perplexity_ratio"]
    console.print(f"{name}: heads {heads}, {rate:.2f} tokens per step, {ratio:.4f} times the original's perplexity")


if __name__ == "__main__":
    main()
