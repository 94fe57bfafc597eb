"""Dynamic trees: at every step the nodes that are likeliest in the current context (beyond the paper).

A static tree has its nodes where heads are right on average. A dynamic tree takes the N nodes with the greatest product of head
probabilities at this step. It favours a guess that followed the same tokens earlier in the context, which heads cannot know,
since each guesses without the others' guesses. Decoding is exact with any tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from medusa.config import from_mapping
from medusa.errors import InvalidTree
from medusa.trees.history import History, pair_end, pair_start, triple_end, triple_start
from medusa.trees.static import check_depth
from medusa.trees.tensors import Guesses, TreeTensors, paths_up, tree_tensors

LEAST_COST = 1e-5  # minimum cost of a node in nats, so that children rank behind their parents
RANKS = 64  # default number of guesses of each head that may become nodes
BEAM = 8  # number of likeliest paths of each depth along which path heads score their guesses


@dataclass(frozen=True)
class DynamicTree:
    """A tree of the N likeliest nodes, rebuilt at every step; its shapes are static.

    Args:
        num_nodes: N, the root included.
        copied: number of nodes that form a path copied from what followed the previous occurrence of the current suffix.
        depth: number of heads used.
        ranks: number of guesses of each head that may become nodes.
        temperatures: divisor of each head's log-probabilities (`tempered`); () is 1 for all heads.
        pair_bonus, triple_bonus: increase in the log-odds of a guess if it followed the same token, or the same two tokens,
            earlier in the context.

    Raises:
        InvalidTree: a number is out of range.

    >>> tree = DynamicTree(num_nodes=16, depth=5)
    >>> len(tree), tree.depth
    (16, 5)
    """

    num_nodes: int
    depth: int
    ranks: int = RANKS
    temperatures: tuple[float, ...] = ()
    pair_bonus: float = 3.0
    triple_bonus: float = 4.0
    copied: int = 0

    def __post_init__(self) -> None:
        for name in ("num_nodes", "depth", "ranks"):
            value = getattr(self, name)
            least = 2 if name == "num_nodes" else 1
            if type(value) is not int or value < least:
                raise InvalidTree(f"{name} of a dynamic tree is {value!r}, expected an integer of at least {least}")
        object.__setattr__(self, "temperatures", tuple(self.temperatures) or (1.0,) * self.depth)
        if len(self.temperatures) < self.depth or not all(
            isinstance(value, int | float) and 0 < value < float("inf") for value in self.temperatures
        ):
            raise InvalidTree(f"temperatures of a dynamic tree are {self.temperatures}, expected {self.depth} above 0")
        if type(self.copied) is not int or not 0 <= self.copied <= self.num_nodes - 2:
            raise InvalidTree(f"copied is {self.copied!r}, expected 0 to {self.num_nodes - 2} of {self.num_nodes} nodes")
        for name in ("pair_bonus", "triple_bonus"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise InvalidTree(f"{name} of a dynamic tree is {value!r}, expected at least 0")
            object.__setattr__(self, name, float(value))

    def __len__(self) -> int:
        return self.num_nodes

    def check(self, num_heads: int, vocab_size: int) -> None:
        """Raise InvalidTree unless the heads can fill the tree."""
        check_depth(self.depth, num_heads)

    def to_dict(self) -> dict[str, Any]:
        """`{"dynamic": {...}}`, as saved."""
        return {"dynamic": dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], source: str) -> DynamicTree:
        """The tree of a saved mapping; ConfigError for an unknown key or a value of the wrong type."""
        return from_mapping(cls, found["dynamic"], source)

    def for_batch(self, batch: int) -> DynamicTree:
        return self

    def drafter(self, device: torch.device | str | None = None) -> DynamicDrafter:
        """The drafter that fills the tree during a request on this device."""
        temperatures = None
        if any(temperature != 1 for temperature in self.temperatures[: self.depth]):
            temperatures = torch.tensor(self.temperatures[: self.depth], dtype=torch.float32, device=device)
        return DynamicDrafter(
            self.num_nodes, self.depth, self.ranks, temperatures, self.pair_bonus, self.triple_bonus, self.copied
        )


def rest_of(
    log_p: Tensor,  # (..., R): the greatest log-probabilities of a vocabulary
) -> Tensor:  # (..., 1)
    """The log-probability of all other tokens together."""
    return torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))


def tempered(
    log_p: Tensor,  # (..., R): log-probabilities, up to a constant
    rest: Tensor,  # (..., 1): of all other tokens together, up to the same
    temperatures: Tensor | float,  # (...), or one for all
) -> Tensor:  # (..., R)
    """Log-probabilities after a temperature, which corrects over- or underconfident heads; all other tokens count as one."""
    if isinstance(temperatures, Tensor):
        temperatures = temperatures.unsqueeze(-1).to(log_p)
    scaled = torch.cat([log_p, rest], dim=-1) / temperatures
    return scaled.log_softmax(-1)[..., :-1]


@dataclass(frozen=True)
class DynamicDrafter:
    """Builds every row's tree on the device: a beam over depths, with no sync and no loop over nodes."""

    num_nodes: int
    num_heads: int
    ranks: int
    temperatures: Tensor | None  # (D,) float32; None: all 1
    pair_bonus: float
    triple_bonus: float
    copied: int

    @property
    def depth(self) -> int:
        return max(self.num_heads, self.copied)

    @property
    def fixed(self) -> None:
        return None

    @property
    def reads_history(self) -> bool:
        return bool(self.pair_bonus or self.triple_bonus or self.copied)

    def guess(
        self,
        head_logits: Tensor,  # (D, B, V)
    ) -> Guesses:
        log_p, tokens = head_logits.float().log_softmax(-1).topk(min(self.ranks, head_logits.shape[-1]), dim=-1)
        return Guesses(tokens, log_p)

    def assemble(
        self,
        root: Tensor,  # (B,) long
        guesses: Guesses | None,
        history: History | None = None,
    ) -> tuple[Tensor, TreeTensors]:
        """The token of every node (B, N), and every row's own tree.

        A node is at most as likely as its parent. So the likeliest N - 1 of a depth, drawn from the likeliest N - 1 of the
        depth above, hold all nodes of that depth that belong to the tree; the tree is the likeliest N - 1 of all depths.
        """
        assert guesses is not None and guesses.log_p is not None
        wanted, ranks = self.num_nodes - self.copied - 1, guesses.tokens.shape[-1]
        value, previous = guesses.log_p.new_zeros(len(root), 1), root[:, None]
        before = history.last[:, None] if history is not None else previous
        log_p, rest = guesses.log_p, rest_of(guesses.log_p)
        if guesses.noise is not None:
            log_p = log_p + guesses.noise
        if self.temperatures is not None or guesses.noise is not None:
            log_p = tempered(log_p, rest, 1.0 if self.temperatures is None else self.temperatures[:, None])
        odds = _odds(log_p)
        path = root[:, None, None][..., :0]  # (B, W, depth): the tokens behind the root
        ends = pair_end(guesses.tokens), triple_end(guesses.tokens)
        parent = root.new_full((len(root), 1), -1)
        first = 0  # the number, among the candidates of all depths, of the first of this one
        values, tokens, parents = [], [], []
        for depth in range(self.num_heads):
            step = odds[depth, :, None]  # (B, 1, R)
            if depth and guesses.along is not None:
                value, before, previous, path = value[:, :BEAM], before[:, :BEAM], previous[:, :BEAM], path[:, :BEAM]
                scores = guesses.along(depth, path)  # (B, W, R)
                if guesses.noise is not None:
                    scores = scores + guesses.noise[depth, :, None]
                spread = rest[depth, :, None].expand(-1, path.shape[1], -1)
                step = _odds(tempered(scores, spread, 1.0 if self.temperatures is None else self.temperatures[depth]))
            if history is not None and (self.pair_bonus or self.triple_bonus):
                pairs = pair_start(previous)[..., None] + ends[0][depth, :, None]  # (B, W, R)
                triples = triple_start(before, previous)[..., None] + ends[1][depth, :, None]
                said = history.contains(torch.stack([pairs, triples], 1))
                step = step.add(said[:, 0], alpha=self.pair_bonus).add_(said[:, 1], alpha=self.triple_bonus)
            candidates = (value[..., None] + logsigmoid(step) - LEAST_COST).flatten(1)  # (B, W * R)
            value, chosen = candidates.topk(min(wanted, candidates.shape[1]), dim=-1)
            above = chosen // ranks
            before, previous = previous.gather(1, above), guesses.tokens[depth].gather(1, chosen - above * ranks)
            if guesses.along is not None:
                path = torch.cat([path.gather(1, above[..., None].expand(-1, -1, depth)), previous[..., None]], -1)
            parent = above + (first - parent.shape[1]) if depth else parent.expand_as(above)
            first += value.shape[1]
            values.append(value)
            tokens.append(previous)
            parents.append(parent)
        own, above = self._tree(root, torch.cat(values, 1), torch.cat(tokens, 1), torch.cat(parents, 1))
        if self.copied and history is not None:
            # Other nodes may repeat this path: a repeated node wastes its place but does no harm.
            path = torch.arange(above.shape[1] - 1, above.shape[1] - 1 + self.copied, device=root.device)
            above = torch.cat([above, (path * (path >= above.shape[1])).expand(len(root), -1)], dim=1)
            own = torch.cat([own, history.continuation(self.copied)], dim=1)
        return own, tree_tensors(above, self.depth)

    def _tree(self, root: Tensor, values: Tensor, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        """The best of all candidates as a tree: the token (B, N) and the parent (B, N) of every node. The parents given are the
        candidates' own, -1 for the root."""
        batch, candidates = values.shape
        nodes = min(self.num_nodes - self.copied, candidates + 1)
        chosen = values.topk(nodes - 1, dim=-1).indices  # best first: parents before children
        number = root.new_zeros(batch, candidates + 1)  # of the node that a candidate is; the last entry is the root's
        node = torch.arange(nodes, device=root.device)
        number.scatter_(1, chosen, node[1:].expand(batch, -1))
        above = pad(number.gather(1, parents.gather(1, chosen).remainder(candidates + 1)), (1, 0))  # (B, N), the root its own
        order = _depth_first(above, paths_up(above, self.num_heads)[1])
        tokens = torch.cat([root[:, None], tokens.gather(1, chosen)], dim=1)
        both = torch.stack([tokens, order.gather(1, above)], 1)  # (B, 2, N)
        both = torch.empty_like(both).scatter_(2, order[:, None].expand_as(both), both)
        return both[:, 0], both[:, 1]


def _odds(log_p: Tensor) -> Tensor:
    log_p = log_p.clamp(max=-LEAST_COST)
    return log_p - torch.log(-torch.expm1(log_p))


def _depth_first(
    parents: Tensor,  # (B, N) long, nodes numbered best first
    ancestors: Tensor,  # (B, N, N) bool
) -> Tensor:  # (B, N) long
    """Each node's number in depth-first order, the best child first: the likeliest path is then nodes 0, 1, 2, ..., which
    lie in the cache in place. It sums, along the path, one more than the nodes in the subtrees of better siblings."""
    node = torch.arange(parents.shape[1], device=parents.device)
    sizes = ancestors.sum(1)  # (B, N): nodes at or below each
    better = (parents[:, :, None] == parents[:, None]) & (node < node[:, None]) & (node > 0)  # [n, s]: s is n's better sibling
    steps = (better * sizes[:, None]).sum(-1) + (node > 0)
    return (ancestors * steps[:, None]).sum(-1)
