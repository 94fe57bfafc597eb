"""What replacing finished rows at once gains: tokens per second of a pool, compared with batches that wait.

    python benchmarks/admission.py smollm2 --prompts alpaca_eval.json --limit 96 --rows 32 --compile

The same prompts are answered in both ways in turn, with the same seeds. Besides the time, the work is counted, which does not
depend on the machine: a step computes all rows, also those whose request has ended. Uncompiled attention reads every row as
far as the longest, the kernel of compiled steps each row's own slots.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from medusa import MedusaModel, MedusaTree
from medusa.batch.pool import Request, decode_queue
from medusa.checkpoints.hub import find_model
from medusa.checkpoints.loading import load_backbone, load_tokenizer
from medusa.checkpoints.named import dtype_named, quiet_transformers
from medusa.data.prompt_sets import Prompter, read_questions
from medusa.generation.preparation import options_of_rows


class Counted:
    """A model that counts its work: steps, their rows, and the slots that attention reads."""

    def __init__(self, model: Any):
        self._model = model
        self.work: Counter[str] = Counter()
        self.first_seconds = 0.0  # of the first step of each capacity, which is compiled then
        self._capacities: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prefill(self, ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any) -> Any:
        self.work.update(prefills=1, prefilled=ids.numel())
        return self._model.prefill(ids, attention_mask, cache)

    def draft_and_verify(
        self, root: torch.Tensor, hidden: torch.Tensor, drafter: Any, history: Any, frame: Any, cache: Any
    ) -> Any:
        rows, own = len(root), int((frame.lengths + 1).sum())
        self.work.update(steps=1, row_steps=rows, slots_of_longest=rows * (int(frame.base) + 1), own_slots=own)
        start = time.perf_counter()
        drafted = self._model.draft_and_verify(root, hidden, drafter, history, frame, cache)
        if cache.capacity not in self._capacities:
            self._capacities.add(cache.capacity)
            self.first_seconds += time.perf_counter() - start
        return drafted


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
    parser.add_argument("--compile", action="store_true", help="compile the step; the first ones are not timed")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    quiet_transformers()
    model = MedusaModel(load_backbone(find_model(args.model), dtype=dtype_named(args.dtype)))
    prompter = Prompter(load_tokenizer(find_model(args.model)), model.eos_token_ids)
    prompts = [prompter.ids(question, []) for question in read_questions(args.prompts)][: args.limit]
    sampling = {"do_sample": True, "temperature": args.temperature}
    options = options_of_rows(model, "admission", max_new_tokens=args.max_new_tokens, **sampling)

    counted = Counted(model.compiled if args.compile else model)

    def answer(requests: list[Request]) -> int:
        left = iter(requests)
        found = decode_queue(counted, lambda: next(left, None), args.rows, MedusaTree([]), options)
        return sum(len(done.tokens) for done in found)

    def answer_in_batches(requests: list[Request]) -> int:
        return sum(answer(requests[n : n + args.rows]) for n in range(0, len(requests), args.rows))

    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    seconds: dict[str, list[float]] = {"waiting": [], "replaced": []}
    tokens: dict[str, int] = {}
    work: dict[str, Counter[str]] = {}
    for _ in range(args.rounds):
        for way, decode in (("waiting", answer_in_batches), ("replaced", answer)):
            counted.work, counted.first_seconds, start = Counter(), 0.0, time.perf_counter()
            tokens[way], work[way] = decode(requests), counted.work
            seconds[way].append(time.perf_counter() - start - counted.first_seconds)
    rates = {way: args.rounds * tokens[way] / sum(times) for way, times in seconds.items()}
    ratio = rates["replaced"] / rates["waiting"]
    record = {
        "model": args.model,
        "prompts": len(prompts),
        "rows": args.rows,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "compiled": args.compile,
        "tokens": tokens,
        "work": work,
        "seconds": seconds,
        "ratio": ratio,
    }
    for way, counts in work.items():
        per_token = {name: counts[name] / tokens[way] for name in ("row_steps", "slots_of_longest", "own_slots")}
        listed = ", ".join(f"{value:.2f} {name.replace('_', ' ')}" for name, value in per_token.items())
        print(f"{way}: {tokens[way]} tokens, {counts['steps']} steps, {counts['prefills']} prefills; per token {listed}")
    print(f"batches that wait {rates['waiting']:.0f} tokens/s, rows replaced {rates['replaced']:.0f}: {ratio:.2f} times")
    if args.json:
        args.json.write_text(json.dumps(record | {"threads": torch.get_num_threads()}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
