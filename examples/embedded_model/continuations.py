"""Self-distillation text for the embedded heads: the backbone continues its own training files (paper 2.3.2).

    python continuations.py BACKBONE OUT.jsonl --batches 60

Each line is `{"input_ids": [...]}`: a prompt cut from a training file and the backbone's continuation of it, greedy or
sampled in turn. If interrupted, run the same command again to resume. Held-out files are never read.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from corpus import documents
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPERATURES = (0.0, 0.8, 0.0, 0.8, 1.0)  # 0 is greedy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbone")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=192)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    backbone = AutoModelForCausalLM.from_pretrained(args.backbone, dtype=torch.bfloat16)
    texts = [tokenizer(text)["input_ids"] for _, text in documents(held=False)]
    texts = [ids for ids in texts if len(ids) > args.prompt_tokens]
    weights = np.array([len(ids) for ids in texts], dtype=float)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = sum(1 for _ in args.out.open()) // args.batch_size if args.out.exists() else 0
    for batch in range(done, args.batches):
        rng = np.random.default_rng(batch)
        torch.manual_seed(batch)
        prompts = []
        for document in rng.choice(len(texts), args.batch_size, p=weights / weights.sum()):
            start = rng.integers(0, len(texts[document]) - args.prompt_tokens)
            prompts.append(texts[document][start : start + args.prompt_tokens])
        temperature = TEMPERATURES[batch % len(TEMPERATURES)]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        output = backbone.generate(
            torch.tensor(prompts),
            max_new_tokens=args.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static",  # no copy of the cache at every token
            **sampling,
        )
        with args.out.open("a") as file:
            file.writelines(json.dumps({"input_ids": row}) + "\n" for row in output.tolist())
        print(f"batch {batch + 1}/{args.batches} at temperature {temperature}", flush=True)


if __name__ == "__main__":
    main()
