"""Mix training text for the embedded heads.

    python mix.py BACKBONE CONTINUATIONS.jsonl OUT.jsonl --greedy 4 --sampled 2 --corpus 0.5

The backbone's own continuations, so many times each, and blocks of its training files, as a share of the number of
continuations: the first are what decoding meets, the second keep the heads from learning only what the backbone says.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from continuations import BATCH_SIZE, TEMPERATURES
from corpus import documents
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("continuations", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--greedy", type=int, default=2)
    parser.add_argument("--sampled", type=int, default=2)
    parser.add_argument("--corpus", type=float, default=1.0)
    args = parser.parse_args()
    own = args.continuations.read_text().splitlines()
    greedy, sampled = [], []
    for number, line in enumerate(own):
        temperature = TEMPERATURES[number // BATCH_SIZE % len(TEMPERATURES)]
        (sampled if temperature else greedy).append(line)
    length = len(json.loads(own[0])["input_ids"])
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    blocks = []
    for _, text in documents(held=False):
        ids = tokenizer(text, verbose=False)["input_ids"]
        blocks += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    chosen = np.random.default_rng(0).permutation(len(blocks))[: len(own)]
    corpus = [json.dumps({"input_ids": blocks[i]}) for i in chosen]
    lines = greedy * args.greedy + sampled * args.sampled + random.Random(0).sample(corpus, round(args.corpus * len(own)))
    args.out.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} blocks of {length} tokens")


if __name__ == "__main__":
    main()
