"""Is Medusa output the backbone's own? Compares it with transformers' generate or our plain loop, alone and in ragged batches.

    python benchmarks/identity.py smollm2 --prompts mt_bench.jsonl alpaca_eval.json --limit 100 --dtype float32
    python benchmarks/identity.py smollm2 --prompts mt_bench.jsonl --dtype bfloat16 --compile --plain --temperature 0.7

In float32 every answer should be the same. In bfloat16 a pass over many tokens rounds differently from a pass over one; at the
first token that differs the gap between the backbone's two likeliest tokens is printed, in units of the logits' spread, beside
the model's own noise there: the difference between its reading of the text in one pass and token by token. With --plain the
reference is our plain loop, one prompt at a time; compiled on a CPU, its answers should be the same in bfloat16 too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from medusa import MedusaModel, MedusaTree
from medusa.batch.pool import left_padded
from medusa.checkpoints.hub import find_model
from medusa.checkpoints.loading import load_tokenizer
from medusa.checkpoints.named import dtype_named, quiet_transformers
from medusa.checkpoints.quantization import quantized
from medusa.config import Quantization
from medusa.data.prompt_sets import Prompter, read_questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--heads")
    parser.add_argument("--prompts", nargs="+", required=True, help="files of prompts, in any format")
    parser.add_argument("--limit", type=int, default=100, help="number of prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="default: 1 4; sampled: 1")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default="none", choices=get_args(Quantization))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plain", action="store_true", help="compare with our plain loop")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 sample, with --plain")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.temperature and not args.plain:
        parser.error("transformers draws other tokens for a seed; add --plain")
    if args.temperature and args.batch_sizes not in (None, [1]):
        parser.error("each row of a batch draws from a stream of its own; leave --batch-sizes out")
    quiet_transformers()
    dtype = dtype_named(args.dtype)
    model = MedusaModel.from_pretrained(args.model, args.heads, dtype=dtype, **quantized(args.quantization, dtype))
    tokenizer = load_tokenizer(find_model(args.model))
    prompter = Prompter(tokenizer, model.eos_token_ids)
    questions = [question for file in args.prompts for question in read_questions(file)]
    prompts = [prompter.ids(question, []) for question in questions][: args.limit]
    eos = list(model.eos_token_ids)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0, "eos_token_id": eos}
    if args.temperature:
        options["temperature"] = args.temperature
    ours = {"compile": args.compile, "return_dict_in_generate": True}
    own = []
    for number, ids in enumerate(tqdm(prompts, desc="plain" if args.plain else "transformers", dynamic_ncols=True)):
        if args.plain:
            out = model.generate(torch.tensor([ids]), tree=MedusaTree([]), seed=number, **options, **ours)
            own.append(out.new_tokens(0).tolist())
        else:
            out = model.backbone.generate(torch.tensor([ids]), pad_token_id=eos[0], **options)
            own.append(out[0, len(ids) :].tolist())
    record: dict = {
        "model": args.model,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "prompts": len(prompts),
        "same": {},
        "differences": [],
    }
    for size in args.batch_sizes or ([1] if args.temperature else [1, 4]):
        same = 0
        for first in tqdm(range(0, len(prompts), size), desc=f"Medusa, {size} at a time", dynamic_ncols=True):
            batch = prompts[first : first + size]
            ids, mask = left_padded(batch)
            out = model.generate(ids, mask, seed=first, **options, **ours)
            for row in range(len(batch)):
                got, wanted = out.new_tokens(row).tolist(), own[first + row]
                same += got == wanted
                if got != wanted:
                    record["differences"].append({"batch": size, "prompt": first + row, **tie(model, batch[row], got, wanted)})
        record["same"][str(size)] = same
        print(f"{size} at a time: {same} of {len(prompts)} the same")
    for found in record["differences"]:
        where = f"batch {found['batch']}, prompt {found['prompt']}, token {found['at']}"
        print(f"{where}: gap {found['gap']:.4f}, noise {found['noise']:.4f}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def tie(model: MedusaModel, prompt: list[int], got: list[int], wanted: list[int]) -> dict[str, float]:
    """Where two answers diverge: the gap between the two tokens, and the model's own noise, relative to the logits' spread."""
    at = next((n for n, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)) - 1)
    text = torch.tensor([prompt + wanted[:at]])
    whole = model.backbone(text).logits[0, -1].float()
    past = model.backbone(text[:, :-1], use_cache=True).past_key_values
    alone = model.backbone(text[:, -1:], past_key_values=past).logits[0, -1].float()
    spread = (whole - whole.mean()).std()
    gap = (whole[got[at]] - whole[wanted[at]]).abs() / spread
    return {"at": at, "gap": float(gap), "noise": float((whole - alone).abs().max() / spread)}


if __name__ == "__main__":
    main()
