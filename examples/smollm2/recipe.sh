#!/usr/bin/env bash
# Heads for SmolLM2-135M-Instruct from nothing: its own questions and answers, training, the tree. Some three hours on two cores.
#
#     bash examples/smollm2/recipe.sh WORK alpaca_eval.json
#
# WORK is a folder for all that comes of it. If interrupted, run the same command again to resume. alpaca_eval.json holds
# AlpacaEval's instructions; every fourth is held out for evaluation, as is all of MT-Bench.
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

# Plain decoding: a batch of 64 rows is bound by arithmetic, which a tree adds to.
answer() { medusa distill smollm2 --tree root --max-new-tokens 224 --batch-size 64 --compile "$@"; }
answer --data self --samples 4000 --seed 0 --temperature 0.7 --output "$work/self-0.7"
answer --data self --samples 2600 --seed 1 --temperature 1.0 --output "$work/self-1.0"
answer --data "$work/alpaca-train.jsonl" --temperature 0.7 --output "$work/alpaca-0.7"
answer --data "$work/alpaca-train.jsonl" --temperature 0 --output "$work/alpaca-0"

resume=()
[ -d "$work/heads" ] && resume=(--resume)
medusa train smollm2 --config "$(dirname "$0")/heads.yaml" --output "$work/heads" --hidden-states "$work/hidden" "${resume[@]}" \
    --data "$work/self-0.7" --data "$work/self-1.0" --data "$work/alpaca-0.7" --data "$work/alpaca-0"
medusa tune smollm2 --heads "$work/heads" --prompts "$work/alpaca-train.jsonl" --temperature 0.7 --compile \
    --output "$work/heads/medusa_tree.json"
