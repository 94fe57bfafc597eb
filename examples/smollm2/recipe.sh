#!/usr/bin/env bash
# Heads for SmolLM2-135M-Instruct from nothing: its own questions and answers, training, the tree. About three hours on two cores.
#
#     bash examples/smollm2/recipe.sh WORK alpaca_eval.json
#
# WORK is a folder for all that comes of it; run again it goes on where it stopped. alpaca_eval.json holds AlpacaEval's 805
# instructions; every fourth is held out for evaluation, with all of MT-Bench.
set -euo pipefail
work=$1
alpaca=$2
mkdir -p "$work"
python - "$alpaca" "$work" <<'PYTHON'
import json, sys
from pathlib import Path
instructions = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
for name, chosen in (("train", [r for n, r in enumerate(instructions) if n % 4]), ("held-out", instructions[::4])):
    lines = [json.dumps({"messages": [{"role": "user", "content": r["instruction"]}]}) + "\n" for r in chosen]
    Path(sys.argv[2], f"alpaca-{name}.jsonl").write_text("".join(lines), encoding="utf-8")
PYTHON

answer() { medusa distill smollm2 --tree root --heads '' --max-new-tokens 224 --batch-size 96 "$@"; }
