"""Dynamic trees: at every step the nodes that are likeliest in this very context (beyond the paper).

A static tree spends its nodes where heads are right on average. A dynamic one asks how sure the heads are now: it takes the N
nodes with the greatest product of head probabilities along their path, and counts a guess more that continues its path as the
context has before, which heads, each guessing on its own, cannot know. Any tree is exact, so it only has to be good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa.config import from_mapping
from medusa.context import Context
from medusa.errors import InvalidTree
from medusa.tree import Guesses, TreeTensors, ancestors_of

LEAST_COST = 1e-3  # of a node, in nats, however sure: children stay behind their parents


@dataclass(frozen=True)
class DynamicTree:
    """The N likeliest nodes at every step, static in shape.

    Args:
        num_nodes: N, the root included.
        depth: heads used.
        ranks: guesses of each head that may become nodes.
        temperatures: per head, what its logits are divided by before they are probabilities; () is 1 for all.
        pair_bonus, triple_bonus: nats that a guess gains where the context has had it after the same token, and after the same
            two; 0 looks at the heads alone.

    Raises:
        InvalidTree: a number out of its range.

    >>> tree = DynamicTree(num_nodes=16, depth=5)
    >>> len(tree), tree.depth
    (16, 5)
    """

    num_nodes: int
    depth: int
    ranks: int = 64
    temperatures: tuple[float, ...] = ()
    pair_bonus: float = 2.0
    triple_bonus: float = 2.0

    def __post_init__(self) -> None:
        for name in ("num_nodes", "depth", "ranks"):
            value = getattr(self, name)
            least = 2 if name == "num_nodes" else 1
            if type(value) is not int or value < least:
                raise InvalidTree(f"{name} of a dynamic tree is {value!r}, wanted an integer of at least {least}")
        object.__setattr__(self, "temperatures", tuple(self.temperatures) or (1.0,) * self.depth)
        if len(self.temperatures) < self.depth or not all(0 < value < float("inf") for value in self.temperatures):
            raise InvalidTree(f"temperatures of a dynamic tree are {self.temperatures}, wanted {self.depth} above 0")
        for name in ("pair_bonus", "triple_bonus"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidTree(f"{name} of a dynamic tree is {getattr(self, name)}, wanted at least 0")

    def __len__(self) -> int:
        return self.num_nodes

    def check(self, num_heads: int, vocab_size: int) -> None:
        """Raise InvalidTree unless the heads can fill the tree."""
        if self.depth > num_heads:
            raise InvalidTree(
                f"tree needs {self.depth} heads, there are {num_heads}; pass a shallower tree or train with "
                f"--num-heads {self.depth}"
            )

    def to_dict(self) -> dict[str, Any]:
        """`{"dynamic": {...}}`, as saved."""
        return {"dynamic": dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], source: str) -> DynamicTree:
        """The tree of a saved mapping; ConfigError for an unknown key or a value of the wrong type."""
        fields = dict(found["dynamic"])
        if isinstance(fields.get("temperatures"), list):
            fields["temperatures"] = tuple(fields["temperatures"])
        return from_mapping(cls, fields, source)

    def for_batch(self, batch: int) -> DynamicTree:
        return self

    def drafter(self, device: torch.device | str | None = None) -> DynamicDrafter:
        """What fills the tree with tokens in a decoding request on a device."""
        temperatures = torch.tensor(self.temperatures[: self.depth], dtype=torch.float32, device=device)
        return DynamicDrafter(self.num_nodes, self.depth, self.ranks, temperatures, self.pair_bonus, self.triple_bonus)


@dataclass(frozen=True)
class DynamicDrafter:
    """Builds every row's tree on the device: a beam over depths, with no sync and no loop over nodes."""

    num_nodes: int
    num_heads: int
    ranks: int
    temperatures: Tensor  # (D,) float32
    pair_bonus: float
    triple_bonus: float

    @property
    def reads_context(self) -> bool:
        return bool(self.pair_bonus or self.triple_bonus)

    @property
    def shape(self) -> tuple[float, ...]:
        return (self.num_nodes, self.num_heads, self.ranks, self.pair_bonus, self.triple_bonus)

    def guess(
        self,
        head_logits: Tensor,  # (D, B, V)
    ) -> Guesses:
        log_p = (head_logits.float() / self.temperatures[:, None, None]).log_softmax(-1)
        values, tokens = log_p.topk(min(self.ranks, log_p.shape[-1]), dim=-1)
        return Guesses(tokens, values)

    def assemble(
        self,
        root: Tensor,  # (B,) long
        guesses: Guesses | None,
        context: Context | None = None,
    ) -> tuple[Tensor, TreeTensors]:
        """The token of every node (B, N), and every row's own tree.

        A node is at most as likely as its parent. So the likeliest N - 1 of a depth, drawn from the likeliest N - 1 of the
        depth above, hold all nodes of that depth that belong to the tree; the tree is the likeliest N - 1 of all depths.
        """
        assert guesses is not None and guesses.log_p is not None
        wanted = self.num_nodes - 1
        batch = len(root)
        before, previous = None if context is None else context.last[:, None], root[:, None]
        value = guesses.log_p.new_zeros(batch, 1)
        lineage = root.new_zeros(batch, 1, 0)  # candidates above, by their number among those of all depths
        values, tokens, lineages = [], [], []
        first = 0  # the number of this depth's first candidate
        for log_p, guessed in zip(guesses.log_p, guesses.tokens, strict=True):
            step = log_p[:, None].expand(-1, value.shape[1], -1)  # (B, W, R)
            if self.reads_context and context is not None and before is not None:
                token = guessed[:, None].expand_as(step)
                step = step + self.pair_bonus * context.said(previous[..., None], token)
                step = step + self.triple_bonus * context.said(before[..., None], previous[..., None], token)
            candidates = (value[..., None] + step.clamp(max=-LEAST_COST)).flatten(1)  # (B, W * R)
            value, chosen = candidates.topk(min(wanted, candidates.shape[1]), dim=-1)
            parent = chosen // step.shape[-1]
            before, previous = previous.gather(1, parent), guessed.gather(1, chosen % step.shape[-1])
            number = torch.arange(first, first + value.shape[1], device=root.device).expand(batch, -1)
            above = lineage.gather(1, parent[..., None].expand(-1, -1, lineage.shape[-1]))
            lineage = torch.cat([above, number[..., None]], dim=-1)
            first += value.shape[1]
            values.append(value)
            tokens.append(previous)
            lineages.append(pad(lineage, (0, self.num_heads - lineage.shape[-1]), value=-1))
        return self._tree(root, torch.cat(values, 1), torch.cat(tokens, 1), torch.cat(lineages, 1))

    def _tree(self, root: Tensor, values: Tensor, tokens: Tensor, lineages: Tensor) -> tuple[Tensor, TreeTensors]:
        """The best of all candidates as a tree."""
        batch, candidates, depth = lineages.shape
        nodes = min(self.num_nodes, candidates + 1)
        chosen = values.topk(nodes - 1, dim=-1).indices  # best first: parents before children
        number = torch.full((batch, candidates + 1), -1, device=root.device)
        number.scatter_(1, chosen, torch.arange(1, nodes, device=root.device).expand(batch, -1))
        above = lineages.gather(1, chosen[..., None].expand(-1, -1, depth)).remainder(candidates + 1)  # -1: the last entry
        lineage = pad(number.gather(1, above.flatten(1)).view_as(above), (1, 0, 1, 0), value=-1)  # (B, N, D + 1)
        lineage[..., 0] = 0
        tokens = torch.cat([root[:, None], tokens.gather(1, chosen)], dim=1)
        order = _depth_first(lineage)
        lineage = pad(order, (0, 1), value=-1).gather(1, lineage.remainder(nodes + 1).flatten(1)).view_as(lineage)
        lineage = torch.empty_like(lineage).scatter_(1, order[..., None].expand_as(lineage), lineage)
        tokens = torch.empty_like(tokens).scatter_(1, order, tokens)
        depths = (lineage >= 0).sum(-1) - 1
        parents = lineage.gather(-1, (depths - 1).clamp(min=0)[..., None]).squeeze(-1)
        return tokens, TreeTensors(parents, depths, lineage, ancestors_of(lineage))


def _depth_first(
    lineage: Tensor,  # (B, N, D + 1) long, nodes numbered best first
) -> Tensor:  # (B, N) long
    """Each node's number in depth-first order, the best child first: the likeliest path is then nodes 0, 1, 2, ..., which
    lie in the cache where they belong. It sums, along the path, one more than the nodes in the subtrees of better siblings."""
    depths = (lineage >= 0).sum(-1) - 1
    parents = lineage.gather(-1, (depths - 1).clamp(min=0)[..., None]).squeeze(-1)
    ancestors = ancestors_of(lineage)
    sizes = ancestors.sum(1)  # (B, N): nodes at or below each
    node = torch.arange(lineage.shape[1], device=lineage.device)
    better = (parents[:, :, None] == parents[:, None]) & (node < node[:, None]) & (node > 0)  # [n, s]: s is n's better sibling
    steps = 1 + (better * sizes[:, None]).sum(-1)  # (B, N)
    steps[:, 0] = 0
    return (ancestors * steps[:, None]).sum(-1)
