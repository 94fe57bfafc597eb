"""The cost of a step: time by tree size on Llamas with random weights, split into its parts.

    python benchmarks/step_cost.py [--shapes smollm2 1.1b vicuna-7b] [--nodes 1 16 64] [--kind path] [--dynamic] [--compiled]

Random heads are nearly never right, so every step accepts about one token and costs are those of a step alone. Each
tree is measured in turn within each round; ratios are to the plain step of the same run. Drafting is what heads and the tree's
assembly add to the backbone's pass over the same tree, timed in turn with it, in plain steps. Bytes are those of the weights
that a step must read (backbone without its embedding table, heads that the tree uses) and of the KV cache. On a GPU, launches
are what the CPU starts in a step: kernels and graphs. With --hardware (what `medusa simulate --measure --output FILE` measured)
the prediction of medusa.simulation stands beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from medusa import DynamicTree, MedusaHeads, MedusaModel, MedusaTree
from medusa.backbone.compilation import Compiled
from medusa.batch.rows import DecodingOptions
from medusa.batch.state import Decodable, DecodingState
from medusa.decoding import prefill, step
from medusa.simulation.hardware import Hardware, load_hardware
from medusa.simulation.machine import copy_bandwidth, now
from medusa.simulation.prediction import Setting
from medusa.simulation.shapes import shape_of
from medusa.trees.files import Tree
from medusa.trees.tensors import Drafted, Frame

SHAPES: dict[str, dict] = {
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    | dict(vocab_size=49152, tie_word_embeddings=True),
    "160m": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "1.1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4),
    "vicuna-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
}
PARTS = ("backbone", "heads", "accept", "keep")
DRAFT_VOCABULARY = 8192  # of heads that share the LM head or read tokens


def tree_of(nodes: int, heads: int) -> MedusaTree:
    """A tree of a given size that uses all heads: the chain of first guesses, then further guesses level by level."""
    if nodes == 1:
        return MedusaTree([])
    paths: list[tuple[int, ...]] = [(0,) * depth for depth in range(1, heads + 1)][: nodes - 1]
    rank = 1
    while len(paths) < nodes - 1:
        paths += [(0,) * depth + (rank,) for depth in range(heads)][: nodes - 1 - len(paths)]
        rank += 1
    return MedusaTree(paths)


def build(shape: str, num_heads: int, kind: str, shared: bool, device: str) -> MedusaModel:
    config = LlamaConfig(**{"vocab_size": 32000, "max_position_embeddings": 2048} | SHAPES[shape])
    reads: dict = {"token_map": torch.arange(DRAFT_VOCABULARY)} if shared or kind != "medusa" else {}
    if kind != "medusa":
        reads |= {"heads_kind": kind, "embedding_size": config.hidden_size}
    with torch.device(device):
        torch.manual_seed(0)
        backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        heads = MedusaHeads.for_lm_head(backbone.lm_head, num_heads, shared=shared, **reads)
        for parameter in heads.parameters():
            if parameter is not backbone.lm_head.weight:
                torch.nn.init.normal_(parameter, std=0.02)
    return MedusaModel(backbone, heads, tree_of(num_heads + 1, num_heads))


class Alone:
    """A model whose step reads a tree that is already drafted: the backbone's pass alone."""

    def __init__(self, model: MedusaModel):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def draft_and_verify(self, root: Any, hidden: Any, drafted: Drafted, history: Any, frame: Frame, cache: Any) -> Drafted:
        states = self._model.lm.verify(drafted.tokens, drafted.tree, frame, cache)
        return Drafted(drafted.tokens, drafted.tree, states, self._model.logits(states))


@torch.inference_mode()
def drafting(model: Decodable, alone: Decodable, state: DecodingState, args: argparse.Namespace, device: str) -> float:
    """Seconds that drafting adds to the backbone's pass: the median of differences between two passes in turn."""
    drafter, frame = state.guided_drafter({}, None), state.frame(model.static_shapes)
    ahead = (state.root, state.hidden)
    drafted = model.draft_and_verify(*ahead, drafter, state.history, frame, state.cache)
    differences = []
    for round_ in range(args.steps * args.rounds + 2):
        start = now(device)
        model.draft_and_verify(*ahead, drafter, state.history, frame, state.cache)
        between = now(device)
        alone.draft_and_verify(*ahead, drafted, state.history, frame, state.cache)
        if round_ >= 2:
            differences.append(2 * between - start - now(device))
    return statistics.median(differences)


def weight_bytes(model: MedusaModel, tree: MedusaTree) -> int:
    backbone = sum(p.numel() * p.element_size() for p in model.backbone.parameters())
    table = model.backbone.get_input_embeddings().weight
    if model.backbone.get_output_embeddings().weight is table:  # a step reads it as the LM head
        table = table[:0]
    heads = (p for k in range(tree.depth) for p in model.heads.parts(k).parameters())
    return backbone - table.numel() * table.element_size() + sum(p.numel() * p.element_size() for p in heads)


def cache_bytes(state: DecodingState) -> int:
    layers = state.cache.layers
    length = len(state.rows[0].prompt)
    return sum(t[:, :, :length].numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


def measure(model: MedusaModel, sizes: list[int], args: argparse.Namespace, device: str) -> list[dict]:
    ids = torch.randint(model.vocab_size, (1, args.context), device=device)
    options = DecodingOptions(max_new_tokens=1024)
    trees: dict[int, Tree] = {nodes: tree_of(nodes, model.num_heads) for nodes in sizes}
    if args.dynamic:
        trees |= {nodes: DynamicTree(nodes, model.num_heads) for nodes in sizes if nodes > 1}
    decodable = model.compiled if args.compiled else model
    states = {nodes: prefill(decodable, ids, None, tree, options) for nodes, tree in trees.items()}
    seconds: dict[int, list[float]] = {nodes: [] for nodes in trees}
    for round_ in range(args.rounds + 1):
        for nodes, state in states.items():
            for _ in range(args.steps):
                start = now(device)
                step(decodable, state)
                if round_:  # the first round warms up
                    seconds[nodes].append(now(device) - start)
    bandwidth = copy_bandwidth(device)
    alone: Any = Compiled(Alone(model), noise=model.lm.probe()) if args.compiled else Alone(model)
    plain = statistics.median(seconds[sizes[0]])
    rows = []
    for nodes, state in states.items():
        median = statistics.median(seconds[nodes])
        moved = weight_bytes(model, trees[nodes]) + cache_bytes(state)
        rows.append(
            {
                "nodes": nodes,
                "milliseconds": 1e3 * median,
                "overhead": median / plain,
                "drafting": drafting(decodable, alone, state, args, device) / plain if nodes > 1 else 0.0,
                "parts": split(decodable, state, args.steps, device),
                "launches": launches(decodable, state) if device != "cpu" else None,
                "bytes": moved,
                "bandwidth_share": moved / median / bandwidth,
            }
        )
    return rows


def add_prediction(rows: list[dict], model: MedusaModel, hardware: Hardware, args: argparse.Namespace) -> None:
    """Add to each row its predicted time and overhead, and the error of the predicted overhead."""
    setting = Setting(shape_of(model.backbone.config), hardware, "bfloat16", args.num_heads, own_lm_heads=not args.shared)
    length = args.context + args.steps * args.rounds // 2  # a step accepts about one token
    for row in rows:
        seconds = setting.seconds(1, length, row["nodes"])
        overhead = seconds / setting.seconds(1, length, 1)
        error = overhead / row["overhead"] - 1
        row |= {"predicted_milliseconds": 1e3 * seconds, "predicted_overhead": overhead, "overhead_error": error}


def split(model: Decodable, state: DecodingState, steps: int, device: str) -> dict[str, float]:
    """The share of each part of a step's time, from the profiler."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    start = now(device)
    with profile(activities=activities) as profiler:
        start = now(device)
        for _ in range(steps):
            step(model, state)
        total = now(device) - start
    averages = {event.key: event for event in profiler.key_averages()}
    shares = {}
    for part in PARTS:
        event = averages.get(f"medusa.{part}")
        time_us = 0 if event is None else event.device_time_total if device != "cpu" else event.cpu_time_total
        shares[part] = time_us * 1e-6 / total
    return {**shares, "rest": max(0.0, 1 - sum(shares.values()))}


def launches(model: Decodable, state: DecodingState) -> int:
    """The number of kernels and graphs that the CPU launches in a step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(model, state)
    return sum(event.count for event in profiler.key_averages() if "LaunchKernel" in event.key or "GraphLaunch" in event.key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--shapes", nargs="+", default=["vicuna-7b"] if cuda else ["160m", "1.1b"], choices=[*SHAPES])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    parser.add_argument("--num-heads", type=int, default=5)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="steps of each tree in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=("medusa", "root", "path"), default="medusa", help="what the heads read")
    parser.add_argument("--dynamic", action="store_true", help="dynamic trees, instead of static ones")
    parser.add_argument("--shared", action="store_true", help="heads share the LM head")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--hardware", help="a machine's name or a file of `medusa simulate --measure`: compare")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hardware = load_hardware(args.hardware) if args.hardware else None
    if args.nodes[0] != 1:
        parser.error("--nodes must begin with 1, the plain step that the others are compared with")

    logging.set_verbosity_error()
    device = "cuda" if cuda else "cpu"
    console = Console(file=sys.stdout, width=120)
    results = {}
    for shape in args.shapes:
        model = build(shape, args.num_heads, args.kind, args.shared, device)
        rows = results[shape] = measure(model, args.nodes, args, device)
        if hardware is not None:
            add_prediction(rows, model, hardware, args)
        kind = "shared LM head" if args.shared else "own LM heads"
        table = Table(title=f"{shape}, bfloat16, {device}, {args.num_heads} {args.kind} heads ({kind})", title_justify="left")
        predicted = ("predicted ms", "overhead", "error") if hardware else ()
        counted = ("launches",) if cuda else ()
        for column in ("nodes", "ms", "overhead", "drafting", *PARTS, "rest", "GB", "of copy bandwidth", *counted, *predicted):
            table.add_column(column, justify="right")
        for row in rows:
            shares = (f"{row['parts'][part]:.1%}" for part in (*PARTS, "rest"))
            beside = [str(row["launches"])] if cuda else []
            if hardware is not None:
                beside += [
                    f"{row['predicted_milliseconds']:.2f}",
                    f"{row['predicted_overhead']:.2f}",
                    f"{row['overhead_error']:+.0%}",
                ]
            table.add_row(
                str(row["nodes"]),
                f"{row['milliseconds']:.2f}",
                f"{row['overhead']:.2f}",
                f"{row['drafting']:.2f}",
                *shares,
                f"{row['bytes'] / 1e9:.2f}",
                f"{row['bandwidth_share']:.0%}",
                *beside,
            )
        console.print(table)
        del model
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"torch": torch.__version__, "shared": args.shared, "results": results}, indent=2))


if __name__ == "__main__":
    main()
