"""What it gains that a row whose answer ends is replaced at once: tokens a second of a pool, and of batches that wait.

    python benchmarks/admission.py smollm2 --prompts alpaca_eval.json --limit 96 --rows 32

The same prompts are answered both ways in turn, with the same seeds; answers are compared in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from medusa import MedusaModel, MedusaTree
from medusa.checkpoints.hub import find_model
from medusa.checkpoints.loading import load_backbone, load_tokenizer
from medusa.checkpoints.named import dtype_named, quiet_transformers
from medusa.data.prompt_sets import Prompter, read_questions
from medusa.pool import Request, decode_queue
from medusa.preparation import options_of_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", required=True, help="a file of prompts, in any format")
    parser.add_argument("--limit", type=int, default=96, help="number of prompts")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    quiet_transformers()
    model = MedusaModel(load_backbone(find_model(args.model), dtype=dtype_named(args.dtype)))
    prompter = Prompter(load_tokenizer(find_model(args.model)), model.eos_token_ids)
    prompts = [prompter.ids(question, []) for question in read_questions(args.prompts)][: args.limit]
    sampling = {"do_sample": True, "temperature": args.temperature}
    options = options_of_rows(model, "admission", max_new_tokens=args.max_new_tokens, **sampling)

    def answer(requests: list[Request]) -> int:
        left = iter(requests)
        found = decode_queue(model, lambda: next(left, None), args.rows, MedusaTree([]), options)
        return sum(len(done.tokens) for done in found)

    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    seconds: dict[str, list[float]] = {"waiting": [], "replaced": []}
    tokens = {}
    for _ in range(args.rounds):
        start = time.perf_counter()
        tokens["waiting"] = sum(answer(requests[n : n + args.rows]) for n in range(0, len(requests), args.rows))
        seconds["waiting"].append(time.perf_counter() - start)
        start = time.perf_counter()
        tokens["replaced"] = answer(requests)
        seconds["replaced"].append(time.perf_counter() - start)
    rates = {way: args.rounds * tokens[way] / sum(times) for way, times in seconds.items()}
    ratio = rates["replaced"] / rates["waiting"]
    record = {
        "model": args.model,
        "prompts": len(prompts),
        "rows": args.rows,
        "tokens": tokens,
        "seconds": seconds,
        "ratio": ratio,
    }
    print(f"batches that wait {rates['waiting']:.0f} tokens/s, rows replaced {rates['replaced']:.0f}: {ratio:.2f} times")
    if args.json:
        args.json.write_text(json.dumps(record | {"threads": torch.get_num_threads()}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
