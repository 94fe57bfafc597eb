"""Runs in vLLM's environment: continuations of prompts, with or without Medusa drafts, and the number of accepted drafts."""

import argparse
import json
import os
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")

from vllm import LLM, SamplingParams, TokensPrompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbone")
    parser.add_argument("prompts", type=Path, help="JSON: lists of token ids; the last one is short, for samples")
    parser.add_argument("output", type=Path)
    parser.add_argument("--heads", help="folder of heads; default: plain decoding")
    parser.add_argument("--num-heads", type=int)
    parser.add_argument("--native", action="store_true", help="by vLLM's own Medusa; default: by medusa.engines.vllm")
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument(
        "--samples", type=int, default=0, help="also continue the short prompt so often, three of four times drawn"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--sampled-tokens", type=int, default=4)
    args = parser.parse_args()
    llm = LLM(
        args.backbone,
        dtype="float32",  # in which greedy output is guaranteed to be the backbone's own
        max_model_len=1024,
        max_num_seqs=args.batch,
        max_num_batched_tokens=192,  # so that prompts are read in parts, beside requests that decode
        enable_chunked_prefill=True,
        enforce_eager=True,
        disable_log_stats=False,  # otherwise nothing is counted
        **speculation(args),
    )
    *prompts, short = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(args.prompts.read_text())]
    greedy = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    found = {"tokens": continued(llm, prompts, greedy), "counts": counts(llm)}
    if args.samples:
        # Requests with a seed, without one, and greedy ones decode in one batch.
        options = {"max_tokens": args.sampled_tokens, "ignore_eos": True}
        seeds = [n if n % 2 else None for n in range(args.samples)]
        kinds = [SamplingParams(temperature=args.temperature, seed=seed, **options) for seed in seeds]
        kinds[::4] = [SamplingParams(temperature=0, **options)] * len(kinds[::4])
        before = found["counts"]
        texts = continued(llm, [short] * args.samples, kinds)
        found["greedy_beside"] = texts[::4]
        found["sampled"] = [text for n, text in enumerate(texts) if n % 4]
        found["sampled_counts"] = {
            name: counted - before[name] for name, counted in counts(llm).items() if "per_pos" not in name
        }
    args.output.write_text(json.dumps(found))


def speculation(args: argparse.Namespace) -> dict:
    if args.heads is None:
        return {}
    if args.native:
        return {"speculative_config": {"method": "medusa", "model": args.heads, "num_speculative_tokens": args.num_heads}}
    proposer = {"method": "custom_class", "model": "medusa.engines.vllm.MedusaProposer"}
    return {
        "speculative_config": {**proposer, "num_speculative_tokens": args.num_heads},
        "additional_config": {"medusa_heads": args.heads},
    }


def continued(llm: LLM, prompts: list[TokensPrompt], settings: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, settings, use_tqdm=False)]


def counts(llm: LLM) -> dict:
    """vLLM's counts of drafts, since it started."""
    metrics = [metric for metric in llm.get_metrics() if metric.name.startswith("vllm:spec_decode")]
    return {metric.name: metric.values if hasattr(metric, "values") else metric.value for metric in metrics}


if __name__ == "__main__":
    main()
