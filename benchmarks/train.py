"""The cost of training: our loss compared with plain logits, and a Medusa-1 step with the frozen forward pass that bounds it.

    python benchmarks/train.py [--parts loss step] [--shapes 16m 160m] [--json FILE]

Loss: K heads on a frozen LM head (`--own-lm-heads`: one each, whose gradients of a batch before are there already) over one
row of tokens; ours, torch's `F.linear_cross_entropy`, and plain logits. Each variant runs in a process of its own, whose
greatest memory beyond what stood before the loss is reported; times are the best of some rounds. Step: forward,
backward and optimiser of all heads on a frozen bfloat16 backbone of random weights, online and from kept hidden states, over
the time of the backbone's forward alone, measured in turn in one run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from medusa import MedusaHeads, MedusaModel
from medusa.training.config import TrainingConfig
from medusa.training.data import Row, collate
from medusa.training.losses import hard_targets, lm_head_loss
from medusa.training.objective import MOST_LOGITS, Objective

SHAPES = {
    "16m": dict(vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6),
    "160m": dict(vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
}
VARIANTS = ("ours", "torch", "plain")
HEADS = 5


def loss_of(variant: str, states: torch.Tensor, lm_head: nn.Linear, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The summed cross-entropy of one head."""
    if variant == "ours":
        chunk = max(1, min(1024, MOST_LOGITS // lm_head.out_features))
        return lm_head_loss(states, lm_head, hard_targets(labels), chunk, dtype)
    if variant == "torch":
        options = nn.LinearCrossEntropyOptions()
        # Without reduction: its sum in bfloat16 is wrong by several per cent.
        return (
            F.linear_cross_entropy(states.to(dtype), lm_head.weight.to(dtype), labels, reduction="none", options=options)
            .double()
            .sum()
        )
    with torch.autocast(states.device.type, dtype, enabled=dtype != torch.float32):
        logits = lm_head(states)
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def measure_loss(
    variant: str, own: bool, vocab: int, hidden: int, tokens: int, dtype: torch.dtype, device: str, rounds: int
) -> dict:
    """Seconds and peak memory of all heads' loss and its gradients, in this process."""
    torch.manual_seed(0)
    lm_heads = [nn.Linear(hidden, vocab, bias=False, device=device) for _ in range(HEADS if own else 1)]
    for lm_head in lm_heads:
        lm_head.requires_grad_(own)
        lm_head.weight.grad = torch.zeros_like(lm_head.weight) if own else None
    labels = torch.randint(vocab, (tokens,), device=device)
    states = torch.randn(HEADS, tokens, hidden, device=device, requires_grad=True)
    states.grad = torch.zeros_like(states)
    before = peak(device)
    seconds = []
    for _ in range(rounds):
        start = now(device)
        sum(loss_of(variant, states[k], lm_heads[k % len(lm_heads)], labels, dtype) for k in range(HEADS)).backward()
        seconds.append(now(device) - start)
    return {"variant": variant, "seconds": min(seconds), "peak_bytes": peak(device) - before}


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_step(shape: str, rows: int, length: int, device: str, rounds: int) -> dict:
    """Seconds of the frozen forward pass, and of a training step online and from stored hidden states."""
    config = LlamaConfig(max_position_embeddings=max(2048, length), **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    model = MedusaModel(backbone)
    heads = MedusaHeads.for_lm_head(backbone.lm_head, HEADS).float().requires_grad_(True)
    ids = torch.randint(config.vocab_size, (rows, length), dtype=torch.int32)
    batch = collate([(n, Row(ids[n], torch.ones(length, dtype=torch.bool), (length,))) for n in range(rows)])
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.no_grad():
        kept = model.hidden_states(batch["input_ids"])

    def forward():
        with torch.no_grad():
            model.hidden_states(batch["input_ids"])

    def training_step(targets: str, **more) -> Callable[[], None]:
        objective = Objective(model, heads, TrainingConfig(targets=targets))
        optimizer = torch.optim.AdamW(heads.parameters(), lr=0.0, fused=True)

        def run():
            optimizer.zero_grad()
            objective(**batch, **more)["loss"].backward()
            optimizer.step()

        return run

    timed: dict[str, Callable[[], None]] = {
        "forward": forward,
        "hard": training_step("hard"),
        "soft": training_step("soft"),
        "hard, hidden states kept": training_step("hard", hidden=kept),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(rounds + 1):
        for name, run in timed.items():
            start = now(device)
            run()
            if round_:  # the first warms up
                seconds[name].append(now(device) - start)
    best = {name: min(found) for name, found in seconds.items()}
    ratios = {name: best[name] / best["forward"] for name in best}
    tokens = rows * length
    return {"shape": shape, "seconds": best, "ratios": ratios, "tokens_per_second": {n: tokens / s for n, s in best.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--parts", nargs="+", default=["loss", "step"], choices=["loss", "step"])
    parser.add_argument("--shapes", nargs="+", default=["16m", "160m"] if device == "cpu" else ["160m", "7b"], choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=128_000)
    parser.add_argument("--hidden", type=int, default=512 if device == "cpu" else 4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--own-lm-heads",
        action="store_true",
        help="loss of heads with their own LM heads, not a frozen one",
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512 if device == "cpu" else 2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # variant and dtype: a process measuring itself
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.one:
        variant, dtype = args.one
        sizes = (args.vocab, args.hidden, args.tokens)
        found = measure_loss(variant, args.own_lm_heads, *sizes, getattr(torch, dtype), device, args.rounds)
        print(json.dumps(found))
        return
    console, record = Console(), {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    record["options"] = {name: value for name, value in vars(args).items() if name not in ("one", "json")}
    if "loss" in args.parts:
        record["loss"] = []
        table = Table("dtype", "loss", "seconds", "tokens/s", "times plain", "peak memory, MiB")
        for dtype in ("float32", "bfloat16"):
            sizes = ["--vocab", str(args.vocab), "--hidden", str(args.hidden), "--tokens", str(args.tokens)]
            sizes += ["--own-lm-heads"] if args.own_lm_heads else []
            found = []
            for variant in VARIANTS:
                command = [sys.executable, __file__, *sizes, "--rounds", str(args.rounds), "--one", variant, dtype]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    console.print(f"{variant} in {dtype} failed: {done.stderr.strip().splitlines()[-1]}", style="red")
                    continue
                found.append({"dtype": dtype, **json.loads(done.stdout)})
            plain = next((entry["seconds"] for entry in found if entry["variant"] == "plain"), float("nan"))
            for entry in found:
                table.add_row(
                    dtype,
                    entry["variant"],
                    f"{entry['seconds']:.2f}",
                    f"{args.tokens / entry['seconds']:.0f}",
                    f"{entry['seconds'] / plain:.2f}",
                    f"{entry['peak_bytes'] / 2**20:.0f}",
                )
            record["loss"] += found
        lm_heads = "LM heads of their own, gradients accumulated" if args.own_lm_heads else "a frozen LM head"
        console.print(
            f"loss of {HEADS} heads, {lm_heads}, {args.tokens} tokens, {args.vocab} in the vocabulary, width {args.hidden}"
        )
        console.print(table)
    if "step" in args.parts:
        record["step"] = []
        table = Table("shape", "what", "seconds", "tokens/s", "times the forward")
        for shape in args.shapes:
            found = measure_step(shape, args.rows, args.length, device, args.rounds)
            record["step"].append(found)
            for name, seconds in found["seconds"].items():
                rate = found["tokens_per_second"][name]
                table.add_row(shape, name, f"{seconds:.3f}", f"{rate:.0f}", f"{found['ratios'][name]:.2f}")
        console.print(f"Medusa-1, {HEADS} heads with their own LM heads, {args.rows} rows of {args.length} tokens, bfloat16")
        console.print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
