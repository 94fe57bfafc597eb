"""The embedded model and its exported heads in vLLM: does greedy output equal the backbone's, are drafts accepted as predicted?

Prints a table and exits 1 where the answer is no.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from medusa import EMBEDDED, MedusaModel, MedusaTree
from medusa.checkpoints.conversion import convert
from medusa.evaluation.prompts import held_out_prompts

TOLERANCE = 0.02  # accepted drafts per step: near-ties of the heads' first guesses may be rounded differently


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    logging.disable_progress_bar()
    model = MedusaModel.from_pretrained(EMBEDDED, dtype=torch.float32)
    prompts = [prompt.ids[None] for prompt in held_out_prompts()[: args.prompts]]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        # In a folder of its own: vLLM treats every safetensors file in the folder as the backbone's.
        model.backbone.save_pretrained(work / "backbone")
        AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(work / "backbone")
        (work / "prompts.json").write_text(json.dumps([prompt[0].tolist() for prompt in prompts]))
        runs = {"vLLM, plain": run(args, work, None, 0)}
        for to in ("vllm", "medusa"):
            convert(EMBEDDED, work / to, to)
            runs[f"vLLM, heads as {to}"] = run(args, work, work / to, model.num_heads)

    wanted = [greedy(model, prompt, args.new_tokens) for prompt in prompts]
    accepted, steps = ours(model, prompts, args.new_tokens, MedusaTree.dense([1] * model.num_heads))
    predicted = sum(accepted) / steps
    print(
        f"{len(prompts)} held-out prompts of {prompts[0].shape[1]} tokens, {args.new_tokens} new ones each, greedy, float32\n"
    )
    print("| | output equals the backbone's | accepted drafts per step | by position |\n|---|---|---|---|")
    print(f"| predicted: our decoder, a chain of {model.num_heads} | | {predicted:.3f} | {shares(accepted, steps)} |")
    freely, in_steps = ours(model, prompts, args.new_tokens, model.tree)
    print(f"| our decoder, its tree of {len(model.tree)} nodes | | {sum(freely) / in_steps:.3f} | {shares(freely, in_steps)} |")
    sound = True
    for label, found in runs.items():
        same = sum(got == want for got, want in zip(found["tokens"], wanted, strict=True))
        sound &= same == len(prompts)
        cells = "| |"
        if counts := found["counts"]:
            drafts = counts["vllm:spec_decode_num_drafts"]
            rate = counts["vllm:spec_decode_num_accepted_tokens"] / drafts
            sound &= abs(rate - predicted) <= TOLERANCE
            cells = f"{rate:.3f} | {shares(counts['vllm:spec_decode_num_accepted_tokens_per_pos'], drafts)} |"
        print(f"| {label} | {same} of {len(prompts)} | {cells}")
    sys.exit(0 if sound else "vLLM's output or its acceptance is not what it should be")


def run(args: argparse.Namespace, work: Path, heads: Path | None, num_heads: int) -> dict:
    """vLLM's continuations of the prompts, and its counts of drafts."""
    command = [args.engine, Path(__file__).with_name("engine.py"), work / "backbone", work / "prompts.json", work / "out.json"]
    command += ["--new-tokens", str(args.new_tokens)]
    if heads is not None:
        command += ["--heads", heads, "--num-heads", str(num_heads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((work / "out.json").read_text())


def greedy(model: MedusaModel, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """transformers' own continuation."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    return model.backbone.generate(prompt, **options)[0, prompt.shape[1] :].tolist()


def ours(model: MedusaModel, prompts: list[torch.Tensor], new_tokens: int, tree: MedusaTree) -> tuple[list[int], int]:
    """Our decoder's accepted drafts by position with a tree, and its number of steps."""
    accepted, steps = [0] * tree.depth, 0
    for prompt in prompts:
        # vLLM emits the first root with the prompt's pass, and counts the whole path of a step cut short by the limit.
        beyond = new_tokens + model.num_heads + 1
        out = model.generate(prompt, max_new_tokens=beyond, do_sample=False, tree=tree, return_dict_in_generate=True)
        emitted = 1
        for length in out.acceptance_lengths[0]:
            if emitted >= new_tokens:
                break
            steps, emitted = steps + 1, emitted + length
            for position in range(length - 1):
                accepted[position] += 1
    return accepted, steps


def shares(accepted: list[int], steps: int) -> str:
    return ", ".join(f"{number / steps:.3f}" for number in accepted)


if __name__ == "__main__":
    main()
