"""Runs in vLLM's environment: greedy generation with and without Medusa drafts, and the number of accepted drafts."""

import argparse
import json
import os
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")

from vllm import LLM, SamplingParams, TokensPrompt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("backbone")
parser.add_argument("prompts", type=Path, help="JSON: lists of token ids")
parser.add_argument("output", type=Path)
parser.add_argument("--heads", help="folder of heads that vLLM reads; default: plain decoding")
parser.add_argument("--num-heads", type=int)
parser.add_argument("--new-tokens", type=int, required=True)
args = parser.parse_args()

speculative = {"method": "medusa", "model": args.heads, "num_speculative_tokens": args.num_heads} if args.heads else None
llm = LLM(
    args.backbone,
    dtype="float32",  # in which greedy output is guaranteed to be the backbone's own
    max_model_len=512,
    max_num_seqs=1,
    enforce_eager=True,
    disable_log_stats=False,  # otherwise nothing is counted
    speculative_config=speculative,
)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(args.prompts.read_text())]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=args.new_tokens), use_tqdm=False)
counts = {}
for metric in llm.get_metrics():
    if metric.name.startswith("vllm:spec_decode"):
        counts[metric.name] = metric.values if hasattr(metric, "values") else metric.value
args.output.write_text(json.dumps({"tokens": [list(output.outputs[0].token_ids) for output in outputs], "counts": counts}))
