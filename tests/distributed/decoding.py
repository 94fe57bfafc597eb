"""What is decoded in one process and, by torchrun, on several ranks: `python decoding.py FOLDER RANKS`.

In float64: ranks add up the parts of a sum in another order than one process does, and in float32 that may decide a near-tie.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from medusa import EMBEDDED, DynamicTree, MedusaModel, MedusaTree
from medusa.data.prompt_sets import held_out_prompts
from medusa.errors import MedusaError
from tiny import left_padded, random_prompt


def load(name: str | Path, ranks: int, **options: Any) -> MedusaModel:
    if ranks > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=ranks)
    return MedusaModel.from_pretrained(name, dtype=torch.float64, **options)


def taken(model: MedusaModel, *args: Any, **options: Any) -> dict[str, Any]:
    output = model.generate(*args, return_dict_in_generate=True, **options)
    return {"tokens": output.sequences.tolist(), "lengths": output.acceptance_lengths, "ends": output.finish_reasons}


def failing(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise ValueError("a criterion of the caller's")


def decode(folder: Path, ranks: int) -> dict[str, Any]:
    """Tokens of many settings, by name."""
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # what each rank would draw by itself differs
    model = load(EMBEDDED, ranks)
    batch = left_padded([prompt.ids[None, : 80 - 30 * i] for i, prompt in enumerate(held_out_prompts()[:2])])
    some = {"max_new_tokens": 12}
    found = {
        "greedy": taken(model, *batch, **some),
        "static": taken(model, *batch, tree=MedusaTree([(0,), (0, 0), (1,), (0, 0, 0), (0, 1)]), **some),
        "sampled": taken(model, *batch, do_sample=True, temperature=0.8, top_p=0.9, seed=7, **some),
        "seed of rank 0": taken(model, *batch, do_sample=True, **some),
        "penalty": taken(model, *batch, repetition_penalty=1.3, presence_penalty=0.4, **some),
        "typical": taken(model, *batch, acceptance="typical", do_sample=True, temperature=0.7, seed=3, **some),
    }
    stream = model.stream(batch[0][:1], batch[1][:1], **some)
    found["two steps of a stream"] = [next(stream).tokens, next(stream).tokens]
    stream.close()
    try:
        taken(model, *batch, stopping_criteria=[failing], **some)
    except Exception as error:
        found["failing"] = [isinstance(error, MedusaError), str(error)]
    found["after that"] = taken(model, *batch, **some)
    tree = DynamicTree(16, 3)
    for kind in ("root", "path"):  # heads that use the backbone's LM head and embedding, which are in parts
        small = load(folder / "backbone", ranks, heads=folder / kind, tree=tree)
        prompts = left_padded([random_prompt(9, seed=1), random_prompt(5, seed=2)])
        found[kind] = [taken(small, *prompts, **some), taken(small, *prompts, do_sample=True, seed=5, **some)]
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = decode(folder, int(sys.argv[2]))
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads at times abort a process that takes them down
