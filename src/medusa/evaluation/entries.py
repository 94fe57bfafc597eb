"""Entries: the decoders of a bench, each with the name that it has in the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medusa.errors import InvalidInput
from medusa.evaluation.decoders import Decoder, MedusaDecoder, TransformersDecoder
from medusa.model import MedusaModel
from medusa.trees.dynamic import DynamicTree
from medusa.trees.static import MedusaTree

DECODERS = ("generate", "plain", "medusa", "prompt-lookup", "assisted")
ACCEPTANCES = ("exact", "typical")
LOOKUP_TOKENS = 10  # guessed at a time by prompt lookup, as in transformers' documentation


@dataclass(frozen=True)
class Entry:
    """A decoder in a bench or an experiment.

    Attributes:
        series, at: its line in the figure, and its place on the axis; None: a baseline.
        tree: the tree that it was given.
        exact: whether its answers should equal those of plain decoding.
    """

    decoder: Decoder
    series: str = ""
    at: float | None = None
    tree: MedusaTree | DynamicTree | None = None
    exact: bool = True


Entries = dict[str, Entry]  # by name


@dataclass(frozen=True)
class BenchConfig:
    """What a bench compares, and how.

    Attributes:
        decoders: of `DECODERS`.
        trees: tree files, presets or `root`, for decoder medusa; empty: the heads' own tree.
        acceptances: exact, typical or both, for decoder medusa.
        epsilon, delta: thresholds of typical acceptance.
        gammas: numbers of tokens in a draft, for decoder assisted.
        max_new_tokens: maximum number of new tokens in an answer.
        temperature: 0 is greedy.
        seed: seed of the draws.
        rounds: number of times each question is answered; the median time counts.
        quality: add quality figures: likelihood under the original backbone, variety, code that compiles.
        compile: compile our decoders' steps.
    """

    decoders: tuple[str, ...] = DECODERS[:3]
    trees: tuple[str, ...] = ()
    acceptances: tuple[str, ...] = ("exact",)
    epsilon: float = 0.09
    delta: float = 0.3
    gammas: tuple[int, ...] = (4,)
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    rounds: int = 1
    quality: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name, known in (("decoders", DECODERS), ("acceptances", ACCEPTANCES)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise InvalidInput(f"{name} of a bench contain {unknown[0]!r}, expected {', '.join(known)}")
        if min(self.rounds, self.max_new_tokens, *self.gammas) < 1 or not self.decoders or not self.acceptances:
            raise InvalidInput("a bench needs decoders, acceptances, and at least 1 round, new token and gamma")
        if self.temperature < 0:
            raise InvalidInput(f"temperature is {self.temperature}, expected 0 (greedy) or more")
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


def bench_entries(
    config: BenchConfig, model: MedusaModel, limits: dict[str, Any], trees: dict[str, Any], draft: MedusaModel | None = None
) -> Entries:
    """The decoders of a bench by the names that they have in its report.

    Args:
        limits: options of every decoder; see `PromptSet`.
        trees: trees of decoder medusa by name; empty: the model's own.
    """
    ours: dict[str, Any] = {**limits, **config.sampling, "seed": config.seed, "compile": config.compile}
    theirs: dict[str, Any] = {**limits, "seed": config.seed}
    if config.temperature:  # transformers' default top-k is switched off, as in our loop
        theirs |= {**config.sampling, "top_k": model.backbone.generation_config.top_k or 0}
    exact = not config.temperature  # when sampling, transformers draws differently
    found: Entries = {}
    for kind in dict.fromkeys(config.decoders):
        if kind == "plain":
            found[kind] = Entry(MedusaDecoder(model, tree=MedusaTree([]), **ours))
        elif kind == "medusa":
            for name, tree in trees.items() or {"": None}.items():
                for acceptance in dict.fromkeys(config.acceptances):
                    title = " ".join(filter(None, ("medusa", name, acceptance if acceptance != "exact" else "")))
                    thresholds: dict[str, Any] = {"acceptance": acceptance}
                    if acceptance == "typical":
                        thresholds |= {"epsilon": config.epsilon, "delta": config.delta}
                    found[title] = Entry(MedusaDecoder(model, tree=tree, **ours, **thresholds))
        elif kind == "assisted":
            assert draft is not None
            for gamma in dict.fromkeys(config.gammas):
                decoder = TransformersDecoder(model, draft=draft.backbone, guesses=gamma, **theirs)
                found[f"assisted {gamma}"] = Entry(decoder, exact=exact)
        else:
            guesses = LOOKUP_TOKENS if kind == "prompt-lookup" else None
            found[kind] = Entry(TransformersDecoder(model, guesses=guesses, **theirs), exact=exact)
    return found
