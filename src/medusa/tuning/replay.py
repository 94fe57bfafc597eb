"""Replay: the tokens that a tree would accept on recorded texts, step by step as in decoding, without the backbone.

The backbone's text does not depend on the tree. Walking it with the drafter and acceptance of the decoding loop therefore gives
the steps that decoding takes (except where runs share a slot of a hashed table). Averages over all places would not: a step
begins where the previous one ended, and long paths skip the easy places.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medusa.acceptance import accept_exact
from medusa.errors import InvalidInput
from medusa.heads import MedusaHeads
from medusa.shortlist import along_paths
from medusa.trees.calibration import Calibration
from medusa.trees.dynamic import DynamicTree, rest_of, tempered
from medusa.trees.history import History
from medusa.trees.search import search_joint_tree
from medusa.trees.static import MedusaTree
from medusa.trees.tensors import Along, Guesses
from medusa.tuning.recording import Recorded

TEMPERATURES = [1.1**n for n in range(-8, 9)]


@dataclass(frozen=True)
class Replayed:
    """Tokens and steps of every text, and the places where the steps began."""

    tokens: Tensor  # (texts,) long
    steps: Tensor  # (texts,) long
    began: list[Tensor]  # of every text, (T,) bool

    @property
    def acceleration_rate(self) -> float:
        """Tokens per step (paper B.1)."""
        return float(self.tokens.sum() / self.steps.sum())

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the acceleration rate, by bootstrap over texts."""
        drawn = torch.randint(len(self.tokens), (1000, len(self.tokens)), generator=torch.Generator().manual_seed(0))
        rates = self.tokens[drawn].sum(1) / self.steps[drawn].sum(1)
        low, high = torch.quantile(rates.double(), torch.tensor([0.025, 0.975]).double()).tolist()
        return low, high


@torch.inference_mode()
def replay_texts(texts: Sequence[Recorded], tree: MedusaTree | DynamicTree) -> Replayed:
    """Walk recorded texts with a tree; InvalidInput if it needs heads or ranks that were not recorded."""
    _, num_heads, ranks = texts[0].guesses.shape
    heads = texts[0].heads if isinstance(tree, DynamicTree) else None
    drafter = tree.drafter()
    asked = drafter.ranks
    if tree.depth > num_heads or asked > ranks:
        raise InvalidInput(
            f"the tree needs {tree.depth} heads with {asked} guesses each, recorded were {num_heads} with {ranks}"
        )
    # Texts as rows, so that each prompt ends in column `width - 1`.
    width, places = max(text.start for text in texts) + 1, torch.tensor([len(text) for text in texts])
    ids = torch.zeros(len(texts), width + int(places.max()) + drafter.depth + num_heads + 2, dtype=torch.long)
    guesses = torch.zeros(len(texts), int(places.max()), tree.depth, asked, dtype=torch.long)
    log_p = torch.zeros(guesses.shape)
    noise = None if texts[0].noise is None else torch.zeros(guesses.shape)
    for row, text in enumerate(texts):
        ids[row, width - text.start - 1 : width - text.start - 1 + len(text.ids)] = text.ids
        guesses[row, : len(text)] = text.guesses[:, : tree.depth, :asked]
        log_p[row, : len(text)] = text.log_p[:, : tree.depth, :asked]
        if noise is not None and text.noise is not None:
            noise[row, : len(text)] = text.noise[:, : tree.depth, :asked]
    hidden = (
        pad_sequence([text.hidden for text in texts if text.hidden is not None], batch_first=True)
        if heads is not None
        else None
    )
    rows, pads = torch.arange(len(texts)), width - 1 - torch.tensor([text.start for text in texts])
    history = History.of(ids[:, :width], pads, ids[:, width], ids.shape[1]) if drafter.reads_history else None
    done, steps = torch.zeros_like(places), torch.zeros_like(places)
    began = torch.zeros(guesses.shape[:2], dtype=torch.bool)
    while bool((active := done < places).any()):
        at = done.clamp(max=places - 1)
        began[rows, at] |= active
        offered = Guesses(guesses[rows, at].transpose(0, 1), log_p[rows, at].transpose(0, 1)) if tree.depth else None
        if offered is not None and heads is not None:
            assert hidden is not None
            offered = offered._replace(along=_along(heads, hidden[rows, at], ids[rows, width + at], offered))
        if offered is not None and noise is not None:
            offered = offered._replace(noise=noise[rows, at].transpose(0, 1))
        tokens, tensors = drafter.assemble(ids[rows, width + at], offered, history)
        said = ids.gather(1, (width + at + 1)[:, None] + tensors.depths.expand_as(tokens))
        accepted = accept_exact(tensors, tokens, said)
        if history is not None:
            history.extend(tokens.gather(1, accepted.path.clamp(min=0)), accepted.length, accepted.bonus)
        done = torch.where(active, done + accepted.length, done).clamp(max=places)  # decoding cuts its last step too
        steps += active
    return Replayed(done, steps, [row[: len(text)] for row, text in zip(began, texts, strict=True)])


def _along(
    heads: MedusaHeads,
    hidden: Tensor,  # (B, d)
    root: Tensor,  # (B,) long
    guesses: Guesses,
) -> Along:
    """The scores of recorded guesses along paths, as in decoding."""
    assert guesses.log_p is not None
    device = next(heads.parameters()).device
    hidden, root, log_p = hidden.to(device, heads.dtype), root.to(device), guesses.log_p.to(device)
    states = heads.states(hidden, len(log_p), root)
    scores = along_paths(heads, hidden, root, states, heads.places(guesses.tokens.to(device)), log_p)
    return lambda depth, paths: scores(depth, paths.to(device)).cpu()


def _along_recorded(text: Recorded) -> Tensor:  # (T, K, R) float32
    """The scores of the guesses of each head along the path that came true, with their noise."""
    scores = text.log_p
    if text.heads is not None and text.hidden is not None:
        offered = Guesses(text.guesses.long().transpose(0, 1), text.log_p.transpose(0, 1))
        places = text.start + 1 + torch.arange(len(text))
        along = _along(text.heads, text.hidden, text.ids[places], offered)
        paths = [text.ids[places[:, None] + 1 + torch.arange(k)] for k in range(1, text.guesses.shape[1])]
        scores = torch.stack([text.log_p[:, 0], *(along(k, path[:, None])[:, 0] for k, path in enumerate(paths, 1))], 1)
    return scores if text.noise is None else scores + text.noise


def fit_static_tree(texts: Sequence[Recorded], num_nodes: int, depth: int | None = None) -> MedusaTree:
    """The tree of the rank paths that came true most often where its own steps begin. The places in between are easier: a long
    path skips them. Where steps begin depends on the tree, so the search is repeated while the rate rises."""
    best, rate, places = MedusaTree([]), 0.0, None
    while True:
        paths = Calibration.of(texts, places).paths
        tree = search_joint_tree([(path, count) for path, count in paths if depth is None or len(path) <= depth], num_nodes)
        found = replay_texts(texts, tree)
        if found.acceleration_rate <= rate:
            return best
        best, rate, places = tree, found.acceleration_rate, found.began


@torch.inference_mode()
def fit_temperatures(texts: Sequence[Recorded]) -> tuple[float, ...]:
    """The temperature of each head under which the recorded text is likeliest (temperature scaling): guesses keep their order,
    and their probabilities become calibrated."""
    right = torch.cat([text.right() for text in texts])
    rest = rest_of(torch.cat([text.log_p for text in texts]))
    scores = torch.cat([_along_recorded(text) for text in texts])
    return tuple(
        round(max((_likelihood(right[:, k], scores[:, k], rest[:, k], t), t) for t in TEMPERATURES)[1], 4)
        for k in range(right.shape[1])
    )


def _likelihood(right: Tensor, scores: Tensor, rest: Tensor, temperature: float) -> float:
    """Mean log-probability of the recorded tokens, (T,) ranks or -1, under tempered guesses (T, R) and the rest (T, 1)."""
    scaled = tempered(scores, rest, temperature)
    missed = torch.log1p(-scaled.exp().sum(-1).clamp(max=1 - 1e-6))
    hit = scaled.gather(1, right[:, None].clamp(min=0))[:, 0]
    return float(torch.where(right >= 0, hit, missed).mean())


def fit_dynamic_tree(texts: Sequence[Recorded], num_nodes: int = 16) -> DynamicTree:
    """The dynamic tree of this size with fitted temperatures, and the bonuses that accept the most on these texts."""
    _, heads, ranks = texts[0].guesses.shape
    best = DynamicTree(num_nodes, heads, ranks, fit_temperatures(texts), 0.0, 0.0)
    rate = replay_texts(texts, best).acceleration_rate
    for pair, triple in itertools.product((0.0, 1.0, 2.0, 3.0, 4.0), (0.0, 2.0, 4.0, 6.0)):
        tree = dataclasses.replace(best, pair_bonus=pair, triple_bonus=triple)
        found = replay_texts(texts, tree).acceleration_rate if pair or triple else 0.0
        if found > rate * 1.002:  # a bonus must gain something
            best, rate = tree, found
    return best
