"""What dynamic trees gain from reading ahead in the draws (docs/architecture.md), on the same texts in one run:

    python benchmarks/read_ahead.py smollm2 --prompts mt_bench.jsonl --limit 24 -n 96 -t 0.7 1.0 --compile
    python benchmarks/read_ahead.py smollm2 --prompts mt_bench.jsonl -t 1.0 --top-p 0.9 --tree SIXTEEN.json

Plain decoding, Medusa without reading ahead and Medusa answer each prompt in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from medusa import MedusaModel, MedusaTree, load_tree
from medusa.batch.state import DecodingState
from medusa.checkpoints.hub import find_model
from medusa.checkpoints.loading import load_tokenizer
from medusa.checkpoints.named import dtype_named, quiet_transformers
from medusa.data.prompt_sets import Prompter, read_questions
from medusa.evaluation.decoders import Decoded, Decoder, MedusaDecoder
from medusa.evaluation.measurement import Estimate, Measurement, compare_decoders, estimate
from medusa.trees.tensors import Frame

PLAIN, BLIND, AHEAD = "plain", "without reading ahead", "Medusa"


class BlindDecoder(MedusaDecoder):
    """Medusa whose trees depend on the heads and the text alone."""

    def __call__(self, ids: Tensor) -> Decoded:
        frame = DecodingState.frame

        def blind(state: DecodingState, static_shapes: bool) -> Frame:
            found = frame(state, static_shapes)
            if found.draws is None:
                return found
            return found._replace(draws=found.draws._replace(temperatures=torch.zeros_like(found.draws.temperatures)))

        with mock.patch.object(DecodingState, "frame", blind):
            return super().__call__(ids)


def ratios(measured: dict[str, Measurement]) -> dict[str, Estimate]:
    """What Medusa gains, with 95 % intervals over prompts."""
    found = {
        "tokens per step": estimate(lambda own: own.acceleration_rate, measured[AHEAD]),
        f"of those {BLIND}": estimate(
            lambda own, other: own.acceleration_rate / other.acceleration_rate, measured[AHEAD], measured[BLIND]
        ),
    }
    for name in (BLIND, PLAIN):
        found[f"tokens/s, of {name}"] = estimate(
            lambda own, other: own.tokens_per_second / other.tokens_per_second, measured[AHEAD], measured[name]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--heads")
    parser.add_argument("--tree", nargs="+", help="tree files [that of the heads]")
    parser.add_argument("--prompts", nargs="+", required=True, help="files of prompts, in any format")
    parser.add_argument("--limit", type=int, default=24, help="number of prompts")
    parser.add_argument("--max-new-tokens", "-n", type=int, default=96)
    parser.add_argument("--temperature", "-t", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    quiet_transformers()
    model = MedusaModel.from_pretrained(args.model, args.heads, dtype=dtype_named(args.dtype))
    prompter = Prompter(load_tokenizer(find_model(args.model)), model.eos_token_ids)
    questions = [question for path in args.prompts for question in read_questions(path)][: args.limit]
    batches = [torch.tensor([prompter.ids(question)]) for question in questions]
    rows: list[dict[str, Any]] = []
    for temperature in args.temperature:
        for name in args.tree or [None]:
            options: dict[str, Any] = {"do_sample": True, "temperature": temperature, "seed": args.seed}
            options |= {"compile": args.compile} | ({} if args.top_p is None else {"top_p": args.top_p})
            tree = load_tree(name) if name else model.tree
            decoders: dict[str, Decoder] = {
                PLAIN: MedusaDecoder(model, args.max_new_tokens, MedusaTree([]), **options),
                BLIND: BlindDecoder(model, args.max_new_tokens, tree, **options),
                AHEAD: MedusaDecoder(model, args.max_new_tokens, tree, **options),
            }
            with tqdm(total=len(decoders) * len(batches), desc=f"temperature {temperature:g}", dynamic_ncols=True) as bar:
                measured = compare_decoders(decoders, batches, on_progress=bar.update)
            same = sum(a == b == c for a, b, c in zip(*(each.outputs for each in measured.values()), strict=True))
            rows.append({"temperature": temperature, "nodes": len(tree), **ratios(measured), "same answers": same})
    table = Table(title=f"{args.model}, {len(batches)} prompts", title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        shown = [f"{v.value:.3f} ({v.low:.3f}-{v.high:.3f})" if isinstance(v, Estimate) else f"{v:g}" for v in row.values()]
        table.add_row(*shown)
    Console(file=sys.stdout, width=150).print(table)
    if args.json is not None:
        args.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
