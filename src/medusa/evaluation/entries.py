"""Entries: the decoders of a bench, each with the name that it has in the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medusa.evaluation.config import BenchConfig
from medusa.evaluation.decoders import Decoder, MedusaDecoder, TransformersDecoder
from medusa.model import MedusaModel
from medusa.trees.dynamic import DynamicTree
from medusa.trees.static import MedusaTree

LOOKUP_TOKENS = 10  # guessed at a time by prompt lookup, as in transformers' documentation


@dataclass(frozen=True)
class Entry:
    """A decoder in a bench or an experiment."""

    decoder: Decoder
    # series, at: its line in the figure, and its place on the axis; None: a baseline.
    series: str = ""
    at: float | None = None
    tree: MedusaTree | DynamicTree | None = None  # the tree that it was given
    exact: bool = True  # whether its answers should equal those of plain decoding


Entries = dict[str, Entry]  # by name


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
