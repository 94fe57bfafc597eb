"""Tokens per step of several heads on the same held-out texts, by replay (docs/architecture.md), with paired ratios:

    python benchmarks/heads.py smollm2 --heads smollm2-medusa-1 smollm2-path --prompts mt_bench.jsonl --fit alpaca_eval.json

The backbone continues every prompt once; all heads guess along its texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from medusa import DynamicTree, MedusaModel, MedusaTree
from medusa.checkpoints.hub import find_model
from medusa.checkpoints.loading import load_tokenizer
from medusa.checkpoints.named import dtype_named, quiet_transformers
from medusa.data.prompt_sets import Prompter, read_questions
from medusa.data.prompts import left_padded
from medusa.evaluation.measurement import resamples
from medusa.generation.mixin import MedusaGenerateOutput
from medusa.tuning.recording import Recorded, guesses_along, noise_along
from medusa.tuning.replay import Replayed, fit_temperatures, replay_texts

RANKS, BONUS, BATCH = 64, 2.0, 8
FEW = 8  # nodes: trees of fewer are two deep
Text = tuple[Tensor, int, tuple[int, int]]  # its ids, the index of the prompt's last token, the stream of its draws


def continued(model: MedusaModel, prompts: list[Tensor], count: int, temperature: float) -> list[Text]:
    """The backbone's continuations of prompts."""
    texts: list[Text] = []
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    options["return_dict_in_generate"] = True
    for seed in tqdm(range(0, len(prompts), BATCH), desc=f"texts at temperature {temperature:g}", dynamic_ncols=True):
        ids, mask = left_padded(prompts[seed : seed + BATCH])
        output = model.generate(ids, mask, max_new_tokens=count, seed=seed, tree=MedusaTree([]), **options)
        assert isinstance(output, MedusaGenerateOutput)
        for row, prompt in enumerate(prompts[seed : seed + BATCH]):
            texts.append((torch.cat([prompt, output.new_tokens(row).to(prompt)]), len(prompt) - 1, (seed, row)))
    return texts


@torch.inference_mode()
def guessed(model: MedusaModel, texts: list[Text], temperature: float) -> list[Recorded]:
    """What heads guess along texts that are long enough."""
    found: list[Recorded] = []
    for ids, start, stream in tqdm(texts, desc="guesses", dynamic_ncols=True):
        text = guesses_along(model, ids, start, RANKS)
        if text is not None:
            found.append(dataclasses.replace(text, noise=noise_along(text, stream, temperature)) if temperature else text)
    return found


def ratio(own: Replayed, other: Replayed) -> tuple[float, float, float]:
    """How many times as many tokens per step, with the 95 % interval by bootstrap over texts."""
    weights = resamples(len(own.tokens))
    rates = [weights @ each.tokens.double() / (weights @ each.steps.double()) for each in (own, other)]
    low, high = torch.quantile(rates[0] / rates[1], torch.tensor([0.025, 0.975]).double()).tolist()
    return own.acceleration_rate / other.acceleration_rate, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--heads", nargs="+", required=True, help="folders or names; the first are those compared with")
    parser.add_argument("--prompts", nargs="+", required=True, help="files of prompts, in any format")
    parser.add_argument("--limit", type=int, default=80, help="number of prompts")
    parser.add_argument("--fit", type=Path, required=True, help="file of prompts on which the trees' temperatures are fitted")
    parser.add_argument("--fit-limit", type=int, default=24, help="number of those")
    parser.add_argument("--max-new-tokens", "-n", type=int, default=134)
    parser.add_argument("--temperature", "-t", type=float, nargs="+", default=[0.7, 0.0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    quiet_transformers()
    models = {name: MedusaModel.from_pretrained(args.model, name, dtype=dtype_named(args.dtype)) for name in args.heads}
    first = models[args.heads[0]]
    if len({model.num_heads for model in models.values()}) > 1:
        sys.exit("heads.py: the heads are not as many in all folders; their texts would differ")
    prompter = Prompter(load_tokenizer(find_model(args.model)), first.eos_token_ids)
    questions = [question for path in args.prompts for question in read_questions(path)][: args.limit]
    held, fit = (
        [torch.tensor(prompter.ids(question)) for question in some]
        for some in (questions, list(read_questions(args.fit))[: args.fit_limit])
    )
    rows: list[dict[str, Any]] = []
    for temperature in args.temperature:
        texts, others = (continued(first, some, args.max_new_tokens, temperature) for some in (held, fit))
        along = {name: guessed(model, texts, temperature) for name, model in models.items()}
        fitted = {name: fit_temperatures(guessed(model, others, temperature)) for name, model in models.items()}
        for nodes in args.nodes:
            depth = first.num_heads if nodes >= FEW else 2
            trees = {name: DynamicTree(nodes, depth, RANKS, fitted[name][:depth], BONUS, BONUS) for name in models}
            replayed = {name: replay_texts(along[name], tree) for name, tree in trees.items()}
            for name, own in replayed.items():
                blind = replay_texts([dataclasses.replace(text, noise=None) for text in along[name]], trees[name])
                row = {"temperature": temperature, "nodes": nodes, "heads": name, "texts": len(own.tokens)}
                row["tokens per step"] = (own.acceleration_rate, *own.interval())
                row[f"of {args.heads[0]}"] = ratio(own, replayed[args.heads[0]])
                row["of itself without reading ahead"] = ratio(own, blind)
                rows.append(row)
    table = Table(title=f"{args.model}, by replay", title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*("{:.3f} ({:.3f}-{:.3f})".format(*v) if isinstance(v, tuple) else str(v) for v in row.values()))
    Console(file=sys.stdout, width=130).print(table)
    if args.json is not None:
        args.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
