"""Cut the embedded model's held-out prompts: `python prompts.py BACKBONE OUT.jsonl`.

Every fourth held-out file is for calibrating the tree, the others are for tests and benchmarks; no file is for both.
"""

import json
import sys
from pathlib import Path

import numpy as np
from corpus import documents
from transformers import AutoTokenizer

PROMPT_TOKENS = 256
PROMPTS_PER_FILE = 4


def main() -> None:
    backbone, out = sys.argv[1], Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    rng = np.random.default_rng(0)
    with out.open("w") as file:
        for number, (source, text) in enumerate(documents(held=True)):
            ids = tokenizer(text, verbose=False)["input_ids"]
            split = "calibration" if number % 4 == 3 else "test"
            # At least one prompt apart, and each followed by more text.
            starts = range(0, len(ids) - 2 * PROMPT_TOKENS, 2 * PROMPT_TOKENS)
            for start in sorted(rng.permutation(starts)[:PROMPTS_PER_FILE].tolist()):
                record = {"source": source, "split": split, "input_ids": ids[start : start + PROMPT_TOKENS]}
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
