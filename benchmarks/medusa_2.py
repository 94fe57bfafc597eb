"""What Medusa-2 gives and costs: the tokens per step of adapted models against their distance from the original (paper 2.2.2).

    python benchmarks/medusa_2.py smollm2 --prompts mt_bench.jsonl alpaca_eval.json --limit 144 --compile \
        --runs medusa-1=HEADS lambda-0.01=FOLDER lambda-0.1=FOLDER --work DIR [--plot frontier.svg]

The first run is the control: heads of the original backbone, trained on as many tokens. Every run's model answers the prompts,
and its heads' tokens per step on its own answers are replayed with a dynamic tree, temperatures fitted, beside those of the
control on the original's answers; 95 % intervals by bootstrap over prompts. The distance is the perplexity of the original's
answers under the adapted model, relative to the original's, and the KL divergence from the original there, in nats per token.
Every run's answers are also given their log-likelihood per token under the original (nats) and the share of different 2-grams.
A run already in DIR is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from medusa import MedusaModel, MedusaTree
from medusa.batch.pool import left_padded
from medusa.checkpoints.hub import find_model
from medusa.checkpoints.loading import load_tokenizer
from medusa.checkpoints.named import dtype_named, quiet_transformers
from medusa.data.prompt_sets import Prompter, read_questions
from medusa.evaluation.measurement import resamples
from medusa.evaluation.quality import distinct_ngrams, log_likelihood
from medusa.runs.files import write_json
from medusa.runs.plotting import new_figure, save_plot
from medusa.trees.dynamic import DynamicTree
from medusa.tuning.recording import guesses_along
from medusa.tuning.replay import fit_temperatures, replay_texts

NEW_TOKENS, RANKS = 133, 64
Text = tuple[Tensor, int]  # (P + N,) long, and the index of the prompt's last token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER", help="heads, with or without an adapter")
    parser.add_argument("--prompts", nargs="+", required=True, help="files of prompts, in any format")
    parser.add_argument("--limit", type=int, help="number of prompts of each file")
    parser.add_argument("--temperatures", "-t", type=float, nargs="+", default=[0.7, 0.0])
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=72)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the steps that write the answers")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="draw tokens per step against perplexity: a PNG or SVG file")
    args = parser.parse_args()
    quiet_transformers()
    args.work.mkdir(parents=True, exist_ok=True)
    runs = dict(run.split("=", 1) for run in args.runs)
    files = {name: args.work / f"{name}.json" for name in runs}
    if left := [name for name, file in files.items() if not file.is_file()]:
        original = MedusaModel.from_pretrained(args.model, dtype=dtype_named(args.dtype))
        theirs = {temperature: answers(args, original, temperature) for temperature in args.temperatures}
        for name in left:
            write_json(files[name], measure(args, runs[name], original, theirs))
    found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    for temperature in map(str, args.temperatures):
        show(found, temperature, args.nodes)
    if args.plot:
        plot(found, args.plot)


def measure(args: argparse.Namespace, folder: str, original: MedusaModel, originals: dict[float, list[Text]]) -> dict[str, Any]:
    """All figures of one run, by temperature."""
    model = MedusaModel.from_pretrained(args.model, folder, dtype=dtype_named(args.dtype))
    record = {}
    for temperature, theirs in originals.items():
        own = answers(args, model, temperature)
        said = [(text[: start + 1].tolist(), text[start + 1 :].tolist()) for text, start in own]
        tokens = sum(len(answer) for _, answer in said)
        record[str(temperature)] = {
            "own": accepted(model, own, args.nodes),  # on the adapted model's answers
            "original": accepted(model, theirs, args.nodes),  # on the original's, whatever they are worth to the adapted model
            "scores": scores(model, original, theirs),
            "likelihood": sum(log_likelihood(original, prompt, answer) for prompt, answer in said) / tokens,
            "distinct_2": distinct_ngrams([answer for _, answer in said], 2),
        }
    return record


def answers(args: argparse.Namespace, model: MedusaModel, temperature: float) -> list[Text]:
    prompter = Prompter(load_tokenizer(find_model(args.model)), model.eos_token_ids)
    questions = [question for file in args.prompts for question in list(read_questions(file))[: args.limit]]
    prompts = [prompter.ids(question, []) for question in questions]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # little padding
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    sampling["return_dict_in_generate"] = True
    texts: dict[int, Text] = {}
    for first in range(0, len(order), args.batch_size):
        chosen = order[first : first + args.batch_size]
        ids, mask = left_padded([prompts[number] for number in chosen])
        output = model.generate(
            ids, mask, tree=MedusaTree([]), max_new_tokens=NEW_TOKENS, seed=first, compile=args.compile, **sampling
        )
        for row, number in enumerate(chosen):
            prompt = torch.tensor(prompts[number])
            texts[number] = torch.cat([prompt, output.new_tokens(row).to(prompt)]), len(prompt) - 1
    return [texts[number] for number in range(len(prompts))]


def accepted(model: MedusaModel, texts: list[Text], nodes: int) -> list[tuple[int, int] | None]:
    """Tokens and steps on each text; None where it is too short."""
    recorded = [guesses_along(model, text, start, RANKS) for text, start in texts]
    there = [text for text in recorded if text is not None]
    tree = DynamicTree(nodes, model.num_heads, RANKS, fit_temperatures(there), 2.0, 2.0)
    found = replay_texts(there, tree)
    counts = iter(zip(found.tokens.tolist(), found.steps.tolist(), strict=True))
    return [None if text is None else next(counts) for text in recorded]


@torch.inference_mode()
def scores(model: MedusaModel, original: MedusaModel, texts: list[Text]) -> list[list[float]]:
    """Of each answer: its -log p under the adapted model and the original, KL(original || adapted) summed over its tokens, and
    their number."""
    rows = []
    for text, start in texts:
        adapted, before = (
            one.logits(one.hidden_states(text[None].to(one.device))[0, start:-1]).float().log_softmax(-1).cpu()
            for one in (model, original)
        )
        target = text[start + 1 :, None]
        nats = [float(-log_p.gather(1, target).sum()) for log_p in (adapted, before)]
        rows.append([*nats, float((before.exp() * (before - adapted)).sum()), len(target)])
    return rows


def show(found: dict[str, Any], temperature: str, nodes: int) -> None:
    columns = ("tokens\nper step", "x control", "on the\noriginal's", "perplexity", "KL", "nats", "2-grams")
    table = Table("run", *columns, box=SIMPLE_HEAD, pad_edge=False, padding=0)
    table.title = f"temperature {temperature}, {nodes} nodes"
    control = next(iter(found.values()))[temperature]
    for name, record in found.items():
        run = record[temperature]
        _, _, kl, tokens = map(sum, zip(*run["scores"], strict=True))
        table.add_row(
            name,
            f"{rate(run['own']):.3f}",
            ratio_with_interval(run["own"], control["own"]),
            ratio_with_interval(run["original"], control["own"]),
            f"{perplexity_ratio(run):.3f}",
            f"{kl / tokens:.3f}",
            f"{run['likelihood']:.3f}",
            f"{run['distinct_2']:.3f}",
        )
    Console().print(table)


def rate(counts: list[tuple[int, int] | None]) -> float:
    there = [pair for pair in counts if pair is not None]
    return sum(tokens for tokens, _ in there) / sum(steps for _, steps in there)


def perplexity_ratio(run: dict[str, Any]) -> float:
    """The perplexity of the original's answers under the adapted model, relative to the original's."""
    adapted, before, _, tokens = map(sum, zip(*run["scores"], strict=True))
    return math.exp((adapted - before) / tokens)


def ratio_with_interval(run: list, control: list) -> str:
    """The ratio of two rates over the same prompts, with its 95 % interval by bootstrap over them."""
    pairs = torch.tensor([[*a, *b] for a, b in zip(run, control, strict=True) if a is not None and b is not None]).double()
    sums = torch.cat([pairs.sum(0)[None], resamples(len(pairs)) @ pairs])
    ratios = (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3])
    low, high = torch.quantile(ratios[1:], torch.tensor([0.025, 0.975]).double()).tolist()
    return f"{ratios[0]:.3f}\n{low:.3f}-{high:.3f}"


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens per step of the runs, relative to the control's, against the perplexity that the adapted models lost."""
    figure = new_figure(6, 3.8)
    axes = figure.add_subplot()
    control, *_ = found.values()
    for temperature in control:
        lost = {name: 100 * (perplexity_ratio(record[temperature]) - 1) for name, record in found.items()}
        gained = {name: rate(record[temperature]["own"]) / rate(control[temperature]["own"]) for name, record in found.items()}
        names = sorted(list(found)[1:], key=lost.__getitem__)
        line = f"temperature {temperature}" if float(temperature) else "greedy"
        axes.plot([lost[name] for name in names], [gained[name] for name in names], marker="o", label=line)
        if temperature == list(control)[-1]:
            for name in names:
                axes.annotate(
                    name, (lost[name], gained[name]), textcoords="offset points", xytext=(-8, 6), ha="right", fontsize=7
                )
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xscale("log", nonpositive="clip")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(0.12)
    axes.set(xlabel="perplexity of the original's answers, % above the original's", ylabel="tokens per step (control: 1)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_plot(figure, path)


if __name__ == "__main__":
    main()
