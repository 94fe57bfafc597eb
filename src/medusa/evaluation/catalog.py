"""The paper's experiments: the decoders that each compares, its columns and plots, and the paper's own figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medusa.evaluation import paper
from medusa.evaluation.decoders import MedusaDecoder, TransformersDecoder
from medusa.evaluation.entries import Entries, Entry
from medusa.evaluation.report import GENERATE, PLAIN, SPEED_COLUMNS
from medusa.metrics import expected_acceptance_length
from medusa.model import MedusaModel
from medusa.trees.calibration import Calibration
from medusa.trees.dynamic import DynamicTree
from medusa.trees.search import random_dense_tree, search_tree
from medusa.trees.static import MedusaTree
from medusa.tuning.recording import Recorded
from medusa.tuning.replay import fit_dynamic_tree, fit_static_tree

TEMPERATURE = 0.7  # of Figure 5
DRAWS = 3  # dense trees of every size in Figure 4
SIZES = (16, 32, 64, 128, 256)
EPSILONS = tuple(n / 100 for n in range(1, 26))
GAMMAS = (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Setup:
    """The models and settings of an experiment."""

    model: MedusaModel
    limits: Mapping[str, Any]  # options of every decoder: `max_new_tokens`, and the ids that end an answer
    recorded: Callable[[MedusaModel], list[Recorded]]  # function that records texts of a model to search trees on
    medusa_2: MedusaModel | None = None  # the same backbone trained together with its heads, if there is one
    drafts: Mapping[str, MedusaModel] = dataclasses.field(default_factory=dict)  # smaller models with the same tokens, by name
    # nodes, epsilons, gammas: values to sweep; empty: the experiment's own.
    nodes: Sequence[int] = ()
    epsilons: Sequence[float] = ()
    gammas: Sequence[int] = ()
    compile: bool = False

    def ours(self, tree: Any = None, model: MedusaModel | None = None, **options: Any) -> MedusaDecoder:
        """Our loop with a tree; None: the model's own."""
        return MedusaDecoder(model or self.model, tree=tree, compile=self.compile, **self.limits, **options)

    def theirs(self, **options: Any) -> TransformersDecoder:
        """transformers' `generate` on the original backbone."""
        return TransformersDecoder(self.model, **self.limits, **options)

    def drafted(self, gammas: Sequence[int]) -> dict[str, Entry]:
        """Speculative decoding with every draft model and every gamma."""
        return {
            f"{name}, gamma {gamma}": Entry(self.theirs(draft=draft.backbone, guesses=gamma), name, gamma)
            for name, draft in self.drafts.items()
            for gamma in self.gammas or gammas
        }

    def baselines(self) -> dict[str, Entry]:
        """The decoders that speedups are relative to."""
        return {GENERATE: Entry(self.theirs()), PLAIN: Entry(self.ours(MedusaTree([])), tree=MedusaTree([]))}


def speeds(setup: Setup) -> Entries:
    """The model's own tree, and Medusa-2's."""
    kind = setup.model.heads.kind if setup.model.heads is not None else "medusa"
    name = "Medusa-1" if kind == "medusa" else f"Medusa-1, {kind} heads"  # the paper's heads read the hidden state alone
    return setup.baselines() | {name: Entry(setup.ours())} | medusa_2(setup)


def medusa_2(setup: Setup, tree: MedusaTree | None = None) -> Entries:
    if setup.medusa_2 is None:
        return {}
    return {"Medusa-2": Entry(setup.ours(tree, setup.medusa_2), tree=tree, exact=False)}


def techniques(setup: Setup) -> Entries:
    """The techniques of Table 3, each added to the one before, with trees of one size: by default that of the model's own."""
    nodes = setup.nodes[0] if setup.nodes else max(len(setup.model.tree), 8)
    texts = setup.recorded(setup.model)
    calibration = Calibration.of(texts)
    trees: dict[str, MedusaTree | DynamicTree] = {
        "heads without a tree": MedusaTree.dense([1] * setup.model.num_heads),
        "with a dense tree": best_dense_tree(calibration.accuracies, nodes),
        "with the optimised tree": search_tree(calibration.accuracies, nodes),
        "with the jointly optimised tree": fit_static_tree(texts, nodes),
        "with a dynamic tree": dataclasses.replace(fit_dynamic_tree(texts), num_nodes=nodes),
    }
    found = setup.baselines() | {name: Entry(setup.ours(tree), tree=tree) for name, tree in trees.items()}
    if setup.medusa_2 is None:
        return found
    own = Calibration.of(setup.recorded(setup.medusa_2))
    return found | medusa_2(setup, search_tree(own.accuracies, nodes))


def best_dense_tree(accuracies: Sequence[Sequence[float]], num_nodes: int) -> MedusaTree:
    """The dense tree of at most this size that should accept the most tokens; earlier heads give more guesses.

    >>> best_dense_tree([[0.6, 0.2], [0.5, 0.1]], 5).paths
    ((0,), (0, 0), (1,), (1, 0))
    """

    def settings(left: int, most: int, heads: int, above: int) -> list[tuple[int, ...]]:
        """Possible s_k of the remaining heads if `above` nodes have children and `left` nodes may be added."""
        found: list[tuple[int, ...]] = [()]
        for size in range(1, min(most, left // above) + 1 if heads else 1):
            found += [(size, *rest) for rest in settings(left - above * size, size, heads - 1, above * size)]
        return found

    trees = (MedusaTree.dense(list(sizes)) for sizes in settings(num_nodes - 1, len(accuracies[0]), len(accuracies), 1))
    return max(trees, key=lambda tree: expected_acceptance_length(tree, accuracies))


def trees_by_size(setup: Setup) -> Entries:
    """Random dense trees and the best tree of each kind, at every size."""
    texts = setup.recorded(setup.model)
    calibration = Calibration.of(texts)
    sizes = setup.nodes or SIZES
    fitted = fit_dynamic_tree(texts)  # at its usual size, for all sizes
    found = setup.baselines()
    for nodes in sizes:
        drawn = dict.fromkeys(random_dense_tree(nodes, setup.model.num_heads, seed) for seed in range(DRAWS))
        trees: dict[str, MedusaTree | DynamicTree] = {f"dense {nodes}, draw {n}": tree for n, tree in enumerate(drawn, 1)}
        trees |= {
            f"independent {nodes}": search_tree(calibration.accuracies, nodes),
            f"joint {nodes}": fit_static_tree(texts, nodes),
            f"dynamic {nodes}": dataclasses.replace(fitted, num_nodes=nodes),
        }
        for name, tree in trees.items():
            series = name.split()[0]
            found[name] = Entry(setup.ours(tree), f"random {series}" if series == "dense" else series, len(tree), tree)
    return found


def thresholds(setup: Setup) -> Entries:
    """Typical acceptance by epsilon, with delta its square root; beside it greedy decoding and random sampling."""
    sampling: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE, "seed": 0}
    found = {
        PLAIN: Entry(setup.ours(MedusaTree([]), **sampling), tree=MedusaTree([])),
        "random sampling": Entry(setup.ours(**sampling)),
        "greedy": Entry(setup.ours(), exact=False),
    }
    for epsilon in setup.epsilons or EPSILONS:
        options: dict[str, Any] = {**sampling, "acceptance": "typical", "epsilon": epsilon, "delta": math.sqrt(epsilon)}
        found[f"typical, epsilon {epsilon:g}"] = Entry(setup.ours(**options), "typical", epsilon, exact=False)
    return found


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments."""

    title: str
    entries: Callable[[Setup], Entries]  # makes the decoders that it compares
    columns: tuple[str, ...]  # columns of its table
    paper: paper.Paper  # what the paper prints
    options: tuple[str, ...] = ()  # options that it accepts besides a model and prompts
    needs: tuple[str, ...] = ()  # options that must be given
    quality: bool = False  # whether answers are scored
    axis: str | None = None  # what its figure sweeps; "": bars by category; None: no figure
    panels: tuple[str, ...] = ()  # columns that its figure shows

    @property
    def calibrates(self) -> bool:
        return "calibration-prompts" in self.options

    def missing(self, setup: Setup) -> list[str]:
        """The rows that are left out, and the options that would add them."""
        found = []
        if "medusa-2" in self.options and setup.medusa_2 is None:
            found.append("Medusa-2: pass --medusa-2 HEADS")
        if "draft" in self.options and not setup.drafts:
            found.append("speculative decoding: pass --draft MODEL")
        return found


QUALITY_COLUMNS = ("nats per token", "nats beyond plain", "repeated 8-grams", "distinct-2")

EXPERIMENTS = {
    "figure-3": Experiment(
        "Speed and speedup by category",
        speeds,
        SPEED_COLUMNS,
        paper.FIGURE_3,
        ("medusa-2",),
        axis="",
        panels=("tokens/s", "vs generate"),
    ),
    "figure-4": Experiment(
        "Acceleration and speed by the nodes of random dense and of optimised trees",
        trees_by_size,
        SPEED_COLUMNS,
        paper.FIGURE_4,
        ("nodes", "calibration-prompts"),
        axis="nodes",
        panels=("tokens per step", "tokens/s"),
    ),
    "figure-5": Experiment(
        "Typical acceptance by its threshold at temperature 0.7",
        thresholds,
        ("tokens per step", "tokens/s", "vs plain", *QUALITY_COLUMNS),
        paper.FIGURE_5,
        ("epsilon",),
        quality=True,
        axis="epsilon",
        panels=("tokens per step", "nats per token", "repeated 8-grams", "distinct-2"),
    ),
    "table-1": Experiment(
        "Acceleration, overhead, quality and speedup, beside speculative decoding",
        lambda setup: speeds(setup) | setup.drafted(GAMMAS[2:3]),
        (*SPEED_COLUMNS, *QUALITY_COLUMNS[:2]),
        paper.TABLE_1,
        ("medusa-2", "draft", "gamma"),
        quality=True,
    ),
    "table-3": Experiment(
        "What each technique adds to the speedup",
        techniques,
        SPEED_COLUMNS,
        paper.TABLE_3,
        ("medusa-2", "nodes", "calibration-prompts"),
    ),
    "table-4": Experiment("Speedup on AlpacaEval", speeds, SPEED_COLUMNS, paper.TABLE_4, ("medusa-2",), ("prompts",)),
    "figure-7": Experiment(
        "Speculative decoding by draft model and gamma",
        lambda setup: setup.baselines() | setup.drafted(GAMMAS),
        SPEED_COLUMNS,
        paper.FIGURE_7,
        ("draft", "gamma"),
        ("draft",),
        axis="gamma",
        panels=("tokens/s", "tokens per step"),
    ),
}
