#!/usr/bin/env bash
# Everything from scratch on one GPU, by our commands: a code model, its heads, their trees, and what they gain. No network needed.
#
#     bash benchmarks/end_to_end.sh results/gpu [100m|400m|toy]
#
# If interrupted, run the same command again to resume: finished stages are skipped, and every command below continues from what it
# has on disk. So it also runs in slices: `timeout 9m bash benchmarks/end_to_end.sh results/gpu`, until it prints "done".
# An estimate for 100m on an H100 is half an hour, most of it pretraining. Afterwards WORK/results.md has the tables.
set -euo pipefail
work=$1
size=${2:-100m}
python=${PYTHON:-python}
medusa() { "$python" -m medusa "$@"; }

dtype=bfloat16 compile=(--compile) source=() nodes=() new=128 rows=64 device_rows=32 rate=1e-3 saves=100
case $size in
    100m) steps=2000 head_steps=600 own=4096 ;;
    400m) steps=2000 head_steps=600 own=4096 device_rows=16 rate=6e-4 ;;
    toy) # for trying it out on a CPU
        steps=12 head_steps=6 own=8 dtype=float32 compile=() nodes=(--nodes 4) new=10 rows=8 device_rows=4 rate=3e-3 saves=2
        source=(--source "$("$python" -c 'import asyncio; print(asyncio.__path__[0])')") ;;
    *)
        echo "size is $size, expected 100m, 400m or toy" >&2
        exit 2 ;;
esac
mkdir -p "$work"
if [ -e "$work/size" ] && [ "$(cat "$work/size")" != "$size" ]; then
    echo "$work is of size $(cat "$work/size"); use another folder" >&2
    exit 2
fi
echo "$size" >"$work/size"

stage() { # stage NAME COMMAND...: once
    [ -e "$work/$1.done" ] && return
    echo "$1" >&2
    "${@:2}"
    touch "$work/$1.done"
}

# A randomly initialised Llama with a tokenizer, and the Python source installed here as training tokens and prompts.
stage source "$python" "$(dirname "$0")/code_model.py" "$work" --size "$size" "${source[@]}"

# Pretraining is joint training of everything (paper 2.2.2) from random weights; its one small head is not used further.
stage backbone medusa train "$work/random" --method sft --data "$work/train.jsonl" --output "$work/backbone" --resume --dtype $dtype \
    --max-steps $steps --batch-size $device_rows --gradient-accumulation $((rows / device_rows)) --save-steps $saves \
    --learning-rate $rate --backbone-learning-rate $rate --weight-decay 0.1 --warmup-steps $((steps / 10)) \
    --num-heads 1 --shared-lm-head --lambda-0 0.01

# The backbone continues pieces of its own training text (paper 2.3.2).
stage own medusa distill "$work/backbone" --data "$work/seeds.jsonl" --limit $own --output "$work/own" --tree root --dtype $dtype \
    --temperature 0.8 --max-new-tokens $((new * 3 / 2)) --batch-size $((own / 8))

heads() { # heads NAME OPTIONS...
    stage "$1" medusa train "$work/backbone" --data "$work/own" --output "$work/$1" --resume --dtype $dtype --max-steps $head_steps \
        --batch-size $device_rows --gradient-accumulation 1 --warmup-steps $((head_steps / 20)) --save-steps $saves "${@:2}"
}
heads medusa-1 --method medusa-1-self-distill --learning-rate 3e-3
# lambda_0 as in the two-stage recipe: the single stage's 0.01 is for heads that start untrained.
heads medusa-2 --method medusa-2-self-distill --learning-rate 1.5e-3 --heads "$work/medusa-1" --lambda-0 0.2 \
    --lambda-0-schedule constant

for name in medusa-1 medusa-2; do
    stage "$name-tree" medusa tune "$work/backbone" --heads "$work/$name" --prompts "$work/calibration.jsonl" --dtype $dtype --always \
        "${compile[@]}" "${nodes[@]}" --max-new-tokens $new --output "$work/$name/medusa_tree.json"
    bench() { # bench NAME OPTIONS...
        stage "$name-$1" medusa bench "$work/backbone" --heads "$work/$name" --prompts "$work/test.jsonl" --max-new-tokens $new \
            --output "$work/$name-$1" "${@:2}"
    }
    bench float32 --dtype float32 --limit 8 # whose answers equal the plain loop's and transformers'
    bench greedy --dtype $dtype "${compile[@]}"
    bench sampled --dtype $dtype "${compile[@]}" --temperature 0.8
done

for folder in "$work"/medusa-?-{float32,greedy,sampled}; do
    printf '# %s\n\n' "$(basename "$folder")"
    cat "$folder/results.md"
done >"$work/results.md"
echo "done: $work/results.md"
