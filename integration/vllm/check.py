"""Our heads in vLLM: is greedy output the backbone's, sampled output drawn from its distribution, and acceptance as predicted?

Prints a table per model and exits 1 where the answer is no.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import kstest
from transformers.utils import logging

from medusa import MedusaModel, MedusaTree
from medusa.checkpoints.conversion import convert
from medusa.checkpoints.hub import find_heads, find_model
from medusa.checkpoints.loading import load_tokenizer
from medusa.data.prompt_sets import held_out_prompts
from medusa.engines.vllm import draft_chain
from medusa.trees.calibration import CALIBRATION_FILE, Calibration
from medusa.tuning.recording import Recorded, record
from medusa.tuning.replay import replay_texts

QUESTIONS = Path(__file__).with_name("questions.txt")
TOLERANCE = 0.02  # of accepted drafts per step: near-ties of the heads' first guesses may be rounded differently
SHORT = 40  # tokens before samples: on a CPU, vLLM 0.32 cannot read the prompt of a request with a seed in parts
LEAST_P = 1e-3  # of the test that sampled tokens are drawn from the backbone's distribution


@dataclass(frozen=True)
class Case:
    """Heads in vLLM, by our proposer or by its own Medusa."""

    label: str
    heads: str
    native: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", required=True, help="the Python of an environment with vLLM and medusa")
    parser.add_argument("--model", choices=("embedded", "smollm2"), help="check only this one")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="number of requests that decode together")
    parser.add_argument("--samples", type=int, default=1000, help="number of short continuations, three quarters of them drawn")
    parser.add_argument("--temperature", type=float, default=0.7, help="of those drawn")
    args = parser.parse_args()
    logging.disable_progress_bar()
    print(
        f"{args.new_tokens} new tokens, {args.batch} requests at a time, float32; samples at temperature {args.temperature:g}"
    )
    sound = [check(args, name) for name in ("embedded", "smollm2") if args.model in (None, name)]
    sys.exit(0 if all(sound) else "vLLM's output or its acceptance is not what it should be")


def check(args: argparse.Namespace, name: str) -> bool:
    """Print the table of one model; whether all of it is as it should be."""
    model = MedusaModel.from_pretrained(name, dtype=torch.float32)
    model.backbone.generation_config.eos_token_id = None  # every text has its full length
    prompts = prompts_for(name, args.prompts)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # In a folder of its own: vLLM treats every safetensors file in the folder as the backbone's.
        model.backbone.save_pretrained(work / "backbone")
        load_tokenizer(find_model(name)).save_pretrained(work / "backbone")
        (work / "prompts.json").write_text(json.dumps([prompt.tolist() for prompt in [*prompts, prompts[0][-SHORT:]]]))
        wanted = [greedy(model, prompt, args.new_tokens) for prompt in prompts]
        print(f"\n{name}: {len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens\n")
        print(
            "| | greedy is the backbone's | accepted per step | by position | beside samples | samples: p, accepted per step |"
        )
        print("|---|---|---|---|---|---|")
        judge = functools.partial(judge_samples, model, prompts[0][-SHORT:], args.temperature)
        sound = show("plain", run(args, work, None, 0), wanted, None, judge)
        predicted: dict[str, list[float]] = {}
        for case in cases(name, work):
            if case.heads not in predicted:
                alike = MedusaModel.from_pretrained(name, heads=case.heads, dtype=torch.float32)
                alike.backbone.generation_config.eos_token_id = None
                predicted[case.heads] = predict(alike, prompts, args.new_tokens, work)
                shown = ", ".join(f"{chance:.3f}" for chance in predicted[case.heads])
                print(f"| predicted for {Path(case.heads).name} | | {sum(predicted[case.heads]):.3f} | {shown} | | |")
            found = run(args, work, case, model.num_heads)
            sound &= show(case.label, found, wanted, predicted[case.heads], judge)
    return sound


def cases(name: str, work: Path) -> list[Case]:
    if name == "smollm2":
        return [Case("our proposer", str(find_heads(heads))) for heads in ("smollm2-path", "smollm2-medusa-1")]
    for to in ("vllm", "medusa"):
        convert(name, work / to, to)
    own = [Case(f"vLLM's own Medusa, heads as {to}", str(work / to), native=True) for to in ("vllm", "medusa")]
    return [*own, Case("our proposer", str(work / "medusa"))]


def prompts_for(name: str, number: int) -> list[torch.Tensor]:
    if name == "embedded":
        # Of different lengths, so that requests are never in step.
        return [prompt.ids[: 256 - 7 * n] for n, prompt in enumerate(held_out_prompts()[:number])]
    tokenizer = load_tokenizer(find_model(name))
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS.read_text().splitlines()[:number]]
    return [torch.tensor(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats]


def run(args: argparse.Namespace, work: Path, case: Case | None, num_heads: int) -> dict:
    """vLLM's continuations of the prompts, and its counts of drafts."""
    command = [args.engine, Path(__file__).with_name("engine.py"), work / "backbone", work / "prompts.json", work / "out.json"]
    command += ["--new-tokens", str(args.new_tokens), "--batch", str(args.batch)]
    if case is not None:
        command += ["--heads", case.heads, "--num-heads", str(num_heads), *(["--native"] if case.native else [])]
    if case is None or not case.native:
        command += ["--samples", str(args.samples), "--temperature", str(args.temperature)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((work / "out.json").read_text())


def greedy(model: MedusaModel, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """transformers' own continuation."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, "attention_mask": torch.ones_like(prompt[None])}
    return model.backbone.generate(prompt[None], **options)[0, len(prompt) :].tolist()


def predict(model: MedusaModel, prompts: list[torch.Tensor], new_tokens: int, work: Path) -> list[float]:
    """How often each draft is accepted: what `medusa tree --calibration` says of a chain, counted where its steps begin."""
    assert model.heads is not None
    chain = MedusaTree.dense([1] * model.num_heads)
    # The first new token comes with the prompt, before the first step.
    texts = [along_chain(model, text) for text in record(model, prompts, new_tokens - 1, ranks=1)]
    Calibration.of(texts, replay_texts(texts, chain).began).save(work / CALIBRATION_FILE, {})
    command = [sys.executable, "-m", "medusa", "tree", *["--dense", "1"] * model.num_heads, "--calibration", work, "--json"]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["expected_acceptance_length"]
    chances = [*Calibration.load(work).path_chances(chain).values()]
    assert abs(1 + sum(chances) - said) < 1e-9
    return chances


def along_chain(model: MedusaModel, text: Recorded) -> Recorded:
    """The text with the guesses of path heads that read the guesses before theirs; recorded are those from the root alone."""
    if text.hidden is None:
        return text
    assert model.heads is not None
    roots = text.ids[text.start + 1 : text.start + 1 + len(text)]
    drafts = draft_chain(model.heads, text.hidden, roots, model.num_heads)
    return dataclasses.replace(text, guesses=drafts[..., None].int(), hidden=None, heads=None)


def show(
    label: str,
    found: dict,
    wanted: list[list[int]],
    predicted: list[float] | None,
    judge: Callable[[dict], tuple[str, bool]],
) -> bool:
    """Print vLLM's row; whether it is as it should be."""
    same = sum(got == want for got, want in zip(found["tokens"], wanted, strict=True))
    sound, cells, drawn = same == len(wanted), "| ", ""
    if predicted is not None:
        steps = found["counts"]["vllm:spec_decode_num_drafts"]
        shares = [number / steps for number in found["counts"]["vllm:spec_decode_num_accepted_tokens_per_pos"]]
        sound &= abs(sum(shares) / sum(predicted) - 1) <= TOLERANCE
        sound &= all(abs(share - chance) <= TOLERANCE for share, chance in zip(shares, predicted, strict=True))
        cells = f"{sum(shares):.3f} | {', '.join(f'{share:.3f}' for share in shares)}"
    if "sampled" in found:
        drawn, right = judge(found)
        sound &= right
    drawn = drawn or "|"
    print(f"| {label} | {same} of {len(wanted)} | {cells} | {drawn} |", flush=True)
    return sound


def judge_samples(model: MedusaModel, prompt: torch.Tensor, temperature: float, found: dict) -> tuple[str, bool]:
    """What is to be shown of samples and of the greedy texts beside them, and whether they are as they should be."""
    drawn, beside = found["sampled"], found["greedy_beside"]
    same = beside.count(greedy(model, prompt, len(beside[0])))
    p = drawn_from_backbone(model, prompt, drawn, temperature)
    told = f"{same} of {len(beside)} | {len(drawn)}: {p:.3f}"
    if counted := found["sampled_counts"]:
        told += f", {counted['vllm:spec_decode_num_accepted_tokens'] / counted['vllm:spec_decode_num_drafts']:.3f}"
    return told, same == len(beside) and p >= LEAST_P


@torch.inference_mode()
def drawn_from_backbone(model: MedusaModel, prompt: torch.Tensor, sampled: list[list[int]], temperature: float) -> float:
    """The p-value of: every token was drawn from the backbone's distribution given the tokens before it.

    With the tokens in order of likelihood, a token that takes up the interval [a, b) of the cumulative distribution becomes a
    number drawn evenly from it. These numbers are evenly spread over [0, 1) exactly if the tokens are drawn as they should be;
    drafts accepted too often or too rarely shift them.
    """
    generator, numbers = torch.Generator().manual_seed(0), []
    for tokens in torch.tensor(sampled).split(64):
        ids = torch.cat([prompt.expand(len(tokens), -1), tokens], 1)
        logits = model.backbone(ids[:, :-1], logits_to_keep=tokens.shape[1]).logits.double()
        p = (logits / temperature).softmax(-1)
        own = p.gather(2, tokens[..., None])
        before = torch.where(p > own, p, 0).sum(-1)
        numbers.append(before + own[..., 0] * torch.rand(tokens.shape, generator=generator, dtype=torch.double))
    return float(kstest(torch.cat(numbers).flatten().numpy(), "uniform").pvalue)


if __name__ == "__main__":
    main()
