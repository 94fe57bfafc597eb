"""Timing: seconds of a decoding step with each of several trees on this machine."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medusa.model import MedusaModel
from medusa.runs.console import progress
from medusa.trees.dynamic import DynamicTree
from medusa.trees.static import MedusaTree

STEPS = 12  # steps timed in a round


def time_steps(
    model: MedusaModel,
    trees: Sequence[MedusaTree | DynamicTree],
    prompts: Tensor,  # (B, P) long
    steps: int = STEPS,  # number of steps timed in each round
    rounds: int = 5,
    **options: Any,  # options of `MedusaModel.stream`, such as `compile`
) -> list[float]:
    """Seconds of a decoding step with each tree.

    Trees take turns in rounds. A tree's time is the median over rounds of its ratio to the first tree in the same round, times
    the median of the first tree: a machine that is slow for a while is slow for all.
    """
    seconds: list[list[float]] = [[] for _ in trees]
    limit = room_to_time(max(tree.depth for tree in trees), max(tree.drafter().depth for tree in trees), steps)
    turns = [(round_, (turn + round_) % len(trees)) for round_ in range(rounds + 1) for turn in range(len(trees))]
    with progress(f"timing steps, batch {len(prompts)}", len(turns), "trees") as bar:
        for round_, number in turns:  # the first round warms up compilers and caches
            taken: list[float] = []
            while len(taken) < steps:  # a tree that accepts much reaches the end of its stream early
                greedy = {"do_sample": False, "eos_token_id": [], **options}
                stream = model.stream(prompts, torch.ones_like(prompts), max_new_tokens=limit, tree=trees[number], **greedy)
                run = [step.seconds for step in itertools.islice(stream, steps - len(taken) + 2)]
                taken += run[1:-1]  # the first includes the prefill, and the last of a stream may verify nothing
            if round_:
                seconds[number].append(statistics.median(taken))
            bar.update()
    first = statistics.median(seconds[0])
    return [first * statistics.median(a / b for a, b in zip(each, seconds[0], strict=True)) for each in seconds]


def room_to_time(heads: int, deepest: int, steps: int = STEPS) -> int:
    """The number of tokens that timing may emit after a prompt, the same for all trees: enough for all steps if the heads are
    always right, and for three steps of the deepest tree, whose path may be copied."""
    return max((steps + 2) * (heads + 1), 3 * (deepest + 1))
