#!/usr/bin/env bash
# Medusa-2 for SmolLM2-135M-Instruct, on the model's own answers: an adapter for the model and heads for the adapted model, for five
# weights λ0 of the heads' loss, and Medusa-1 heads trained on as many tokens as the control; then what each gives and costs.
#
#     bash examples/smollm2/medusa-2.sh WORK mt_bench.jsonl
#
# WORK is the folder of recipe.sh, whose answers, heads and held-out instructions it uses. A run takes some five minutes on a GPU
# and two hours on two cores. If interrupted, run the same command again. LAMBDAS chooses other weights, e.g. LAMBDAS="0.03 0.1".
set -euo pipefail
work=$1
mt_bench=$2
examples=$(dirname "$0")
data=(--data "$work/self-0.7" --data "$work/self-1.0" --data "$work/alpaca-0.7" --data "$work/alpaca-0")
run() { # NAME METHOD OPTIONS…
    local resume=()
    [ -d "$work/medusa-2/$1" ] && resume=(--resume)
    medusa train smollm2 --method "$2" --config "$examples/medusa-2.yaml" --heads "$work/heads" "${data[@]}" \
        --hidden-states "$work/hidden-packed" --output "$work/medusa-2/$1" "${resume[@]}" "${@:3}"
}
run medusa-1 medusa-1
runs=(medusa-1="$work/medusa-2/medusa-1")
for weight in ${LAMBDAS:-0.003 0.01 0.03 0.1 0.3}; do
    run "lambda-$weight" medusa-2-self-distill --lambda-0 "$weight"
    runs+=("lambda-$weight=$work/medusa-2/lambda-$weight")
done
python "$examples/../../benchmarks/medusa_2.py" smollm2 --prompts "$mt_bench" "$work/alpaca-held-out.jsonl" --limit 80 --compile \
    --runs "${runs[@]}" --work "$work/medusa-2/measured" --plot "$work/medusa-2/frontier.svg"
