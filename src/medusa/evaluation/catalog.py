"""The experiments: which decoders each compares, what its table and its figure show, and the paper's figures beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medusa.evaluation import paper
from medusa.evaluation.decoders import Decoder, MedusaDecoder, TransformersDecoder
from medusa.evaluation.report import GENERATE, PLAIN
from medusa.metrics import expected_acceptance_length
from medusa.model import MedusaModel
from medusa.trees.dynamic import DynamicTree
from medusa.trees.search import search_tree
from medusa.trees.static import MedusaTree
from medusa.tuning.recording import Calibration, Recorded
from medusa.tuning.replay import fit_dynamic_tree, fit_static_tree

TEMPERATURE = 0.7  # of Figure 5
DRAWS = 3  # dense trees of every size in Figure 4
NODES = (16, 32, 64, 128, 256)
EPSILONS = tuple(n / 100 for n in range(1, 26))
GAMMAS = (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Subject:
    """What an experiment is about.

    Attributes:
        limits: options of every decoder: the most new tokens, and the ids that end an answer.
        recorded: a calibration of a model, made when it is asked for.
        medusa_2: its sibling, trained together with its heads; None where there is none.
        drafts: smaller models of the same tokens, by name.
        nodes, epsilons, gammas: what is swept; empty for the experiment's own values.
    """

    model: MedusaModel
    limits: Mapping[str, Any]
    recorded: Callable[[MedusaModel], list[Recorded]]
    medusa_2: MedusaModel | None = None
    drafts: Mapping[str, MedusaModel] = dataclasses.field(default_factory=dict)
    nodes: Sequence[int] = ()
    epsilons: Sequence[float] = ()
    gammas: Sequence[int] = ()
    compile: bool = False

    def ours(self, tree: Any = None, model: MedusaModel | None = None, **options: Any) -> MedusaDecoder:
        """Our loop with a tree (None: the model's own)."""
        return MedusaDecoder(model or self.model, tree=tree, compile=self.compile, **self.limits, **options)

    def theirs(self, **options: Any) -> TransformersDecoder:
        """transformers' generate on the original backbone."""
        return TransformersDecoder(self.model, **self.limits, **options)

    def drafted(self, gammas: Sequence[int]) -> dict[str, Contender]:
        """Speculative decoding with every draft model and gamma."""
        return {
            f"{name}, gamma {gamma}": Contender(self.theirs(draft=draft.backbone, guesses=gamma), name, gamma)
            for name, draft in self.drafts.items()
            for gamma in self.gammas or gammas
        }

    def baselines(self) -> dict[str, Contender]:
        """What speedups are over."""
        return {GENERATE: Contender(self.theirs()), PLAIN: Contender(self.ours(MedusaTree([])), tree=MedusaTree([]))}


@dataclass(frozen=True)
class Contender:
    """A decoder in an experiment.

    Attributes:
        series, at: the line that it belongs to in the figure, and where on its axis; a baseline has no place on it.
        tree: given to it.
        exact: whether it should say what the plain loop says.
    """

    decoder: Decoder
    series: str = ""
    at: float | None = None
    tree: MedusaTree | DynamicTree | None = None
    exact: bool = True


Contenders = dict[str, Contender]


def speeds(subject: Subject) -> Contenders:
    """The model's own tree, and Medusa-2's."""
    found = subject.baselines() | {"Medusa-1": Contender(subject.ours())}
    return found | medusa_2(subject)


def medusa_2(subject: Subject, tree: MedusaTree | None = None) -> Contenders:
    if subject.medusa_2 is None:
        return {}
    return {"Medusa-2": Contender(subject.ours(tree, subject.medusa_2), tree=tree, exact=False)}


def beside_drafts(subject: Subject) -> Contenders:
    return speeds(subject) | subject.drafted(GAMMAS[2:3])


def drafts(subject: Subject) -> Contenders:
    return subject.baselines() | subject.drafted(GAMMAS)


def techniques(subject: Subject) -> Contenders:
    """Each technique of Table 3 added to the one before, trees of one size; the size is that of the model's own tree unless
    given."""
    nodes = subject.nodes[0] if subject.nodes else max(len(subject.model.tree), 8)
    texts = subject.recorded(subject.model)
    calibration = Calibration.of(texts)
    trees: dict[str, MedusaTree | DynamicTree] = {
        "heads without a tree": MedusaTree.dense([1] * subject.model.num_heads),
        "with a dense tree": best_dense_tree(calibration.accuracies, nodes),
        "with the optimised tree": search_tree(calibration.accuracies, nodes),
        "with the jointly optimised tree": fit_static_tree(texts, nodes),
        "with a dynamic tree": dataclasses.replace(fit_dynamic_tree(texts), num_nodes=nodes),
    }
    found = subject.baselines() | {name: Contender(subject.ours(tree), tree=tree) for name, tree in trees.items()}
    if subject.medusa_2 is None:
        return found
    own = Calibration.of(subject.recorded(subject.medusa_2))
    return found | medusa_2(subject, search_tree(own.accuracies, nodes))


def best_dense_tree(accuracies: Sequence[Sequence[float]], num_nodes: int) -> MedusaTree:
    """The dense tree of at most so many nodes that should accept the most, the first heads giving the most guesses.

    >>> best_dense_tree([[0.6, 0.2], [0.5, 0.1]], 5).paths
    ((0,), (0, 0), (1,), (1, 0))
    """

    def settings(left: int, most: int, heads: int, above: int) -> list[tuple[int, ...]]:
        """Top-s_k of the heads from here on, where `above` nodes have children and `left` may be added."""
        found: list[tuple[int, ...]] = [()]
        for size in range(1, min(most, left // above) + 1 if heads else 1):
            found += [(size, *rest) for rest in settings(left - above * size, size, heads - 1, above * size)]
        return found

    trees = (MedusaTree.dense(list(sizes)) for sizes in settings(num_nodes - 1, len(accuracies[0]), len(accuracies), 1))
    return max(trees, key=lambda tree: expected_acceptance_length(tree, accuracies))


def trees_by_size(subject: Subject) -> Contenders:
    """Random dense trees and the best of each kind, at every size."""
    from medusa.trees.search import random_dense_tree

    texts = subject.recorded(subject.model)
    calibration = Calibration.of(texts)
    sizes = subject.nodes or NODES
    fitted = fit_dynamic_tree(texts)  # at its usual size, for all
    found = subject.baselines()
    for nodes in sizes:
        drawn = dict.fromkeys(random_dense_tree(nodes, subject.model.num_heads, seed) for seed in range(DRAWS))
        trees: dict[str, MedusaTree | DynamicTree] = {f"dense {nodes}, draw {n}": tree for n, tree in enumerate(drawn, 1)}
        trees |= {
            f"independent {nodes}": search_tree(calibration.accuracies, nodes),
            f"joint {nodes}": fit_static_tree(texts, nodes),
            f"dynamic {nodes}": dataclasses.replace(fitted, num_nodes=nodes),
        }
        for name, tree in trees.items():
            series = name.split()[0]
            found[name] = Contender(subject.ours(tree), f"random {series}" if series == "dense" else series, len(tree), tree)
    return found


def thresholds(subject: Subject) -> Contenders:
    """Typical acceptance by epsilon, delta its square root; greedy decoding and random sampling beside it."""
    sampling: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE, "seed": 0}
    found = {
        PLAIN: Contender(subject.ours(MedusaTree([]), **sampling), tree=MedusaTree([])),
        "random sampling": Contender(subject.ours(**sampling)),
        "greedy": Contender(subject.ours(), exact=False),
    }
    for epsilon in subject.epsilons or EPSILONS:
        options: dict[str, Any] = {**sampling, "acceptance": "typical", "epsilon": epsilon, "delta": math.sqrt(epsilon)}
        found[f"typical, epsilon {epsilon:g}"] = Contender(subject.ours(**options), "typical", epsilon, exact=False)
    return found


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments.

    Attributes:
        contenders: the decoders it compares.
        columns: titles of the report's columns that its table shows.
        paper: what the paper prints.
        options: what it can be given beyond a model and prompts.
        needs: of these, what it cannot do without.
        quality: whether answers are scored.
        axis: what its figure sweeps; "" where the figure is bars by category, None where there is none.
        panels: the columns that its figure shows.
    """

    title: str
    contenders: Callable[[Subject], Contenders]
    columns: tuple[str, ...]
    paper: paper.Paper
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    quality: bool = False
    axis: str | None = None
    panels: tuple[str, ...] = ()

    @property
    def calibrates(self) -> bool:
        return "calibration-prompts" in self.options

    def missing(self, subject: Subject) -> list[str]:
        """The rows that are left out, and what would fill them."""
        found = []
        if "medusa-2" in self.options and subject.medusa_2 is None:
            found.append("Medusa-2: pass --medusa-2 HEADS")
        if "draft" in self.options and not subject.drafts:
            found.append("speculative decoding: pass --draft MODEL")
        return found


SPEED = ("tokens/s", "vs generate", "vs plain", "tokens a step", "overhead", "identical")
QUALITY = ("nats a token", "nats beyond plain", "repeated 8-grams", "distinct-2")

EXPERIMENTS = {
    "figure-3": Experiment(
        "Speed and speedup by category",
        speeds,
        SPEED,
        paper.FIGURE_3,
        ("medusa-2",),
        axis="",
        panels=("tokens/s", "vs generate"),
    ),
    "figure-4": Experiment(
        "Acceleration and speed by the nodes of random dense and of optimised trees",
        trees_by_size,
        SPEED,
        paper.FIGURE_4,
        ("nodes", "calibration-prompts"),
        axis="nodes",
        panels=("tokens a step", "tokens/s"),
    ),
    "figure-5": Experiment(
        "Typical acceptance by its threshold at temperature 0.7",
        thresholds,
        ("tokens a step", "tokens/s", "vs plain", *QUALITY),
        paper.FIGURE_5,
        ("epsilon",),
        quality=True,
        axis="epsilon",
        panels=("tokens a step", "nats a token", "repeated 8-grams", "distinct-2"),
    ),
    "table-1": Experiment(
        "Acceleration, overhead, quality and speedup, beside speculative decoding",
        beside_drafts,
        (*SPEED, *QUALITY[:2]),
        paper.TABLE_1,
        ("medusa-2", "draft", "gamma"),
        quality=True,
    ),
    "table-3": Experiment(
        "What each technique adds to the speedup",
        techniques,
        SPEED,
        paper.TABLE_3,
        ("medusa-2", "nodes", "calibration-prompts"),
    ),
    "table-4": Experiment("Speedup on AlpacaEval", speeds, SPEED, paper.TABLE_4, ("medusa-2",), ("prompts",)),
    "figure-7": Experiment(
        "Speculative decoding by draft model and gamma",
        drafts,
        SPEED,
        paper.FIGURE_7,
        ("draft", "gamma"),
        ("draft",),
        axis="gamma",
        panels=("tokens/s", "tokens a step"),
    ),
}
