"""Tuning options: what is recorded, tried and timed."""

from __future__ import annotations

from dataclasses import dataclass

from medusa.config import check_options, option
from medusa.errors import InvalidInput

# static; dynamic; copying: dynamic, half of its nodes copied; independent: the paper's static search.
TREE_KINDS = ("static", "dynamic", "copying", "independent")
USUAL_KINDS = TREE_KINDS[:3]
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class TuningConfig:
    """The options of a tuning. Plain decoding is always tried."""

    nodes: tuple[int, ...] = option(SIZES, "Tree size to try, the root included; repeatable (default: 2 to 128).", least=2)
    kinds: tuple[str, ...] = option(
        USUAL_KINDS, "Kind of tree to try; repeatable (default: the first three).", flags=("--kind",), choices=TREE_KINDS
    )
    batches: tuple[int, ...] = option(
        (1,), "Batch size to choose a tree for; repeatable (default: 1).", flags=("--batch",), least=1
    )
    contexts: tuple[int, ...] = option(
        (), "Context length for timing steps; repeatable (default: the prompts' median).", flags=("--context",), least=1
    )
    always: bool = option(False, "Choose a tree even if plain decoding is faster.")
    max_new_tokens: int = option(
        128, "Number of tokens to record after each prompt.", flags=("--max-new-tokens", "-n"), least=1
    )
    temperature: float = option(
        0.0,
        "Temperature of the recorded answers: 0 is greedy; above 0 samples from the model's own distribution.",
        flags=("--temperature", "-t"),
        least=0,
    )
    ranks: int = option(64, "Number of guesses of each head that may become nodes.", least=1)
    batch_size: int = option(8, "Number of prompts continued together while recording.", least=1)
    rounds: int = option(5, "Number of times each tree's steps are timed, in turn.", least=1)
    compile: bool = option(False, "Time steps that are one graph: compiled on a CPU (slow first step), recorded on a GPU.")

    def __post_init__(self) -> None:
        check_options(self, "tuning")
        if not self.nodes or not self.kinds or not self.batches:
            raise InvalidInput(f"tuning needs nodes, kinds and batches, got {self}")
