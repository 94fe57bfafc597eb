"""Mix training text for the embedded heads: `python mix.py BACKBONE CONTINUATIONS.jsonl OUT.jsonl`.

All of the backbone's own continuations and as many blocks of its training files. The continuations are what decoding meets; the
files keep the heads from learning only the backbone's greedy habits.
"""

import json
import sys
from pathlib import Path

import numpy as np
from corpus import documents
from transformers import AutoTokenizer


def main() -> None:
    backbone, continuations, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    own = continuations.read_text().splitlines()
    length = len(json.loads(own[0])["input_ids"])
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    blocks = []
    for _, text in documents(held=False):
        ids = tokenizer(text, verbose=False)["input_ids"]
        blocks += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(blocks))[: len(own)]
    own += [json.dumps({"input_ids": blocks[i]}) for i in chosen]
    out.write_text("\n".join(own) + "\n")
    print(f"{len(own)} blocks of {length} tokens")


if __name__ == "__main__":
    main()
