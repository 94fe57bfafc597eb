#!/usr/bin/env bash
# SmolLM2's heads measured: MT-Bench by category (both turns), AlpacaEval and code prompts, at temperature 0.7 and greedily, against
# transformers' generate and prompt lookup and our plain loop; then the paper's tables and figures (table-1's report has the figures
# of Figure 3: speedup by category). On two cores some 25 minutes.
#
#     bash examples/smollm2/evaluate.sh WORK mt_bench.jsonl alpaca_eval.json
#
# WORK is a folder for the results. If interrupted, run the same command again to resume. LIMIT sets the number of questions of each
# set (default 8: one for each category of MT-Bench). Every fourth instruction of AlpacaEval is held out of the heads' training.
set -euo pipefail
work=$1
mt_bench=$2
alpaca=$3
examples=$(dirname "$0")
limit=${LIMIT:-8}
mkdir -p "$work"
python - "$alpaca" "$work" <<'PYTHON'
import json, sys
from pathlib import Path

records = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
for name, chosen in (("train", [r for n, r in enumerate(records) if n % 4]), ("held-out", records[::4])):
    Path(sys.argv[2], f"alpaca-{name}.json").write_text(json.dumps(chosen), encoding="utf-8")
PYTHON

heads=$(python -c "from medusa.checkpoints.hub import SMOLLM2_HEADS; print(SMOLLM2_HEADS['smollm2-path'])")
python - "$heads" "$work" <<'PYTHON'
import json, sys
from pathlib import Path

shipped = json.loads(Path(sys.argv[1], "medusa_tree.json").read_text(encoding="utf-8"))["dynamic"]
for name, changes in (("shipped", {}), ("no-context", {"pair_bonus": 0.0, "triple_bonus": 0.0}), ("copying", {"copied": 4})):
    Path(sys.argv[2], f"{name}.json").write_text(json.dumps({"dynamic": shipped | changes}), encoding="utf-8")
PYTHON

measure() { # NAME PROMPTS OPTIONS…
    medusa bench smollm2 --prompts "$2" --limit "$limit" -n 96 --compile --output "$work/$1" "${@:3}"
}
all=(--decoder generate --decoder plain --decoder prompt-lookup --decoder medusa)
for t in 0.7 0; do
    measure "mt-bench-$t" "$mt_bench" "${all[@]}" -t "$t"
    measure "alpaca-$t" "$work/alpaca-held-out.json" "${all[@]}" -t "$t"
    measure "code-$t" "$examples/code_prompts.jsonl" "${all[@]}" -t "$t"
    # What the context adds to the heads: no bonus for runs that it repeats; half of the nodes copied from it.
    measure "trees-$t" "$mt_bench" --decoder medusa -t "$t" --tree "$work/shipped.json" --tree "$work/no-context.json" \
        --tree "$work/copying.json"
    measure "medusa-1-$t" "$mt_bench" --heads smollm2-medusa-1 --decoder plain --decoder medusa -t "$t"
done
experiment() { # NAME HEADS OPTIONS…
    medusa experiment "$1" smollm2 --heads "$2" --output "$work/$1-$2" "${@:3}"
}
for name in smollm2-path smollm2-medusa-1; do
    experiment table-1 $name --prompts "$mt_bench" --limit "$limit" -n 96 --compile
    experiment table-3 $name --prompts "$mt_bench" --limit 4 -n 64 --calibration-prompts "$work/alpaca-train.json"
    experiment table-4 $name --prompts "$work/alpaca-held-out.json" --limit "$limit" -n 96 --compile
done
writing=(--prompts "$mt_bench" --category writing --category roleplay --limit 4 -n 64)
experiment figure-5 smollm2-path "${writing[@]}" --compile --epsilon 0.01 --epsilon 0.05 --epsilon 0.09 --epsilon 0.17 --epsilon 0.25
experiment figure-4 smollm2-path "${writing[@]}" --nodes 16 --nodes 64 --calibration-prompts "$work/alpaca-train.json"
