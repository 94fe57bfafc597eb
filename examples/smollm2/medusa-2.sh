#!/usr/bin/env bash
# Medusa-2 for SmolLM2-135M-Instruct: an adapter for the model and heads for the adapted model, on the model's own answers.
#
#     bash examples/smollm2/medusa-2.sh WORK
#
# WORK is the folder of recipe.sh, whose answers, hidden states and heads it reads. If interrupted, run the same command again.
set -euo pipefail
work=$1
resume=()
[ -d "$work/medusa-2" ] && resume=(--resume)
medusa train smollm2 --method medusa-2-self-distill --config "$(dirname "$0")/medusa-2.yaml" --heads "$work/heads" \
    --output "$work/medusa-2" --hidden-states "$work/hidden" "${resume[@]}" \
    --data "$work/self-0.7" --data "$work/self-1.0" --data "$work/alpaca-0.7" --data "$work/alpaca-0"
