"""Options of benches and of the paper's experiments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa.config import check_options, option
from medusa.errors import InvalidInput

DECODERS = ("generate", "plain", "medusa", "prompt-lookup", "assisted")
ACCEPTANCES = ("exact", "typical")


@dataclass(frozen=True)
class BenchConfig:
    """What a bench compares, and how."""

    references: Path | None = option(None, "File of reference answers by question_id.")
    categories: tuple[str, ...] = option((), "Use only questions of this category; repeatable.", flags=("--category",))
    limit: int | None = option(None, "Use N questions, spread evenly over the set.", least=1)
    decoders: tuple[str, ...] = option(
        DECODERS[:3], "Decoder to measure; repeatable (default: the first three).", flags=("--decoder",), choices=DECODERS
    )
    trees: tuple[str, ...] = option((), "Tree for `medusa`; repeatable (default: the heads' own).", flags=("--tree",))
    acceptances: tuple[str, ...] = option(
        ("exact",), "Acceptance for `medusa`; repeatable (default: exact).", flags=("--acceptance",), choices=ACCEPTANCES
    )
    epsilon: float = option(0.09, "Hard threshold of typical acceptance.")
    delta: float = option(0.3, "Entropy-dependent threshold of typical acceptance.")
    draft: str | None = option(None, "Folder or hub id of the draft model for `assisted`.")
    gammas: tuple[int, ...] = option(
        (4,), "Number of tokens in a draft of `assisted`; repeatable (default: 4).", flags=("--gamma",), least=1
    )
    max_new_tokens: int = option(256, "Maximum number of tokens to generate.", flags=("--max-new-tokens", "-n"), least=1)
    temperature: float = option(
        0.0,
        "Temperature: 0 is greedy; above 0 samples from the model's own distribution.",
        flags=("--temperature", "-t"),
        least=0,
    )
    seed: int = option(0, "Seed of the sampling.")
    rounds: int = option(1, "Number of times each question is answered; the median time counts.", least=1)
    quality: bool = option(False, "Also measure quality: likelihood under the original backbone, variety, code that compiles.")
    compile: bool = option(False, "One graph per step: compiled on a CPU (slow first step), recorded on a GPU.")

    def __post_init__(self) -> None:
        if min(self.rounds, self.max_new_tokens, *self.gammas) < 1 or not self.decoders or not self.acceptances:
            raise InvalidInput("a bench needs decoders, acceptances, and at least 1 round, new token and gamma")
        check_options(self, "a bench")
        if ("assisted" in self.decoders) != (self.draft is not None):
            raise InvalidInput("speculative decoding needs both --decoder assisted and --draft MODEL")
        if "typical" not in self.acceptances and (self.epsilon, self.delta) != (BenchConfig.epsilon, BenchConfig.delta):
            raise InvalidInput("epsilon and delta are for typical acceptance; pass --acceptance typical or leave them out")
        if "typical" in self.acceptances and not self.temperature:
            raise InvalidInput(
                "typical acceptance needs a temperature: at 0 it is greedy decoding; pass --temperature 0.7, say"
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of every decoder's draws."""
        return {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}


@dataclass(frozen=True)
class ExperimentConfig:
    """The options of an experiment; those that it does not take are refused."""

    categories: tuple[str, ...] = option((), "Use only questions of this category; repeatable.", flags=("--category",))
    limit: int | None = option(None, "Use N questions, spread evenly over the set.", least=1)
    medusa_2: str | None = option(None, "Medusa-2 heads, with the adapter that was trained together with them.")
    drafts: tuple[str, ...] = option(
        (), "Folder or hub id of a draft model; repeatable (table-1, figure-7).", flags=("--draft",)
    )
    gammas: tuple[int, ...] = option(
        (), "Number of tokens in a draft; repeatable (table-1, figure-7).", flags=("--gamma",), least=1
    )
    nodes: tuple[int, ...] = option(
        (), "Tree size, the root included; repeatable for figure-4, a single one for table-3.", least=2
    )
    epsilons: tuple[float, ...] = option(
        (), "Hard threshold for figure-5; repeatable (default: 0.01 to 0.25).", flags=("--epsilon",), least=0, most=1
    )
    calibration_prompts: str | None = option(
        None,
        "Prompts on which to search for trees, other than --prompts: a named set, file or hub id (default for `embedded`: "
        "its own).",
    )
    max_new_tokens: int = option(128, "Maximum number of tokens to generate.", flags=("--max-new-tokens", "-n"), least=1)
    rounds: int = option(1, "Number of times each question is answered; the median time counts.", least=1)
    compile: bool = option(False, "One graph per step: compiled on a CPU (slow first step), recorded on a GPU.")

    def __post_init__(self) -> None:
        check_options(self, "an experiment")
        if 0 in self.epsilons:
            raise InvalidInput("--epsilon is 0.0, expected above 0 and at most 1")
