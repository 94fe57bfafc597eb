"""Sampling: the backbone's distribution after logits processors, and one reproducible draw per tree node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa.trees.tensors import TreeTensors
from medusa.warpers import RowWarpers, Warpers

BLOCK = 256  # tokens per block of a draw's first level
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
Levels = list[tuple[Tensor, Tensor]]  # per depth d: nodes (n,) long, their lineages (n, d + 1) long
Reads = Literal["scores", "tokens", "length"]  # scores alone; also the row's tokens; also its tokens with padding


@dataclass(frozen=True)
class Processors:
    """The logits processors of a row in order, and what each of them reads."""

    steps: tuple[tuple[LogitsProcessor, Reads], ...] = ()
    warpers: Warpers = field(default_factory=Warpers)  # after the steps
    unseen: int = 0  # leading slots of every prefix that hold no token (soft prompts); processors do not see them

    def __bool__(self) -> bool:
        return bool(self.steps or self.warpers)

    @property
    def read_paths(self) -> bool:
        """Whether one of them reads tokens."""
        return any(reads != "scores" for _, reads in self.steps)

    def __call__(
        self,
        logits: Tensor,  # (B, N, V)
        prefixes: Sequence[Tensor | None],  # per row (length,) long: its tokens so far, left-padded; None: the row has finished
        pads: Sequence[int],  # per row, the number of padding tokens
        nodes: NodePrefixes | None = None,  # None: N = 1, and the logits follow the prefixes
    ) -> Tensor:  # (B, N, V) float32
        """Scores of every node before the warpers: each processor sees the prefix of that node's own path."""
        scores = logits.float()
        prefixes = [prefix if prefix is None else prefix[self.unseen :] for prefix in prefixes]
        pads = [max(0, pad - self.unseen) for pad in pads]
        for process, reads in self.steps:
            if reads == "scores":
                flat = scores.flatten(0, 1)
                scores = process(flat.new_empty((len(flat), 0), dtype=torch.long), flat).view_as(scores)
                continue
            scores = scores.clone()
            for row, prefix in enumerate(prefixes):
                if prefix is None:
                    continue
                if reads == "tokens":
                    prefix = prefix[pads[row] :]
                if nodes is None:
                    scores[row] = process(prefix[None], scores[row])
                    continue
                for level, lineage in nodes.of(row):
                    tail = nodes.tokens[row][lineage]  # (nodes of the level, depth + 1)
                    ids = torch.cat([prefix.expand(len(tail), -1), tail], dim=1)
                    scores[row, level] = process(ids, scores[row, level])
        return scores


@dataclass(frozen=True)
class NodePrefixes:
    """The tokens along the path of every node, by depth, for processors that read tokens."""

    tokens: Tensor  # (B, N) long
    levels: Sequence[Levels]  # one per row, or one for all

    def of(self, row: int) -> Levels:
        return self.levels[row if len(self.levels) > 1 else 0]

    def of_rows(
        self,
        rows: Sequence[int],
        at: Tensor,  # the same, (n,) long
    ) -> NodePrefixes:
        """Those of some rows."""
        return NodePrefixes(self.tokens[at], self.levels if len(self.levels) == 1 else [self.levels[row] for row in rows])


class RowProcessors:
    """The processors of all rows of a batch. Rows that share theirs are processed together.

    Args:
        processors: those of each row, B.
    """

    def __init__(self, processors: Sequence[Processors], device: torch.device):
        self._warpers = RowWarpers([own.warpers for own in processors], device)
        groups: dict[int, list[int]] = {}
        for row, own in enumerate(processors):
            if own.steps:
                groups.setdefault(id(own.steps), []).append(row)
        self._groups = [
            (processors[rows[0]], rows, torch.tensor(rows, device=device) if len(rows) < len(processors) else None)
            for rows in groups.values()
        ]
        self.readers = [row for own, rows, _ in self._groups if own.read_paths for row in rows]  # rows whose tokens are read

    def __call__(
        self,
        logits: Tensor,  # (B, N, V)
        prefixes: Mapping[int, Tensor],  # the tokens so far of each reader, left-padded, unless the row has finished
        pads: Sequence[int],  # per row, the number of padding tokens
        nodes: NodePrefixes | None = None,  # None: N = 1, and the logits follow the prefixes
    ) -> tuple[Tensor, dict[int, Exception]]:
        """Scores of every node (B, N, V), float32 if there are processors; and the error of each row whose processor failed."""
        if not self._groups and not self._warpers:
            return logits, {}
        scores, errors = logits.float(), {}
        for own, rows, at in self._groups:
            of_group = nodes.of_rows(rows, at) if nodes is not None and at is not None else nodes
            given = [prefixes.get(row) for row in rows]
            try:
                found = own(scores if at is None else scores[at], given, [pads[row] for row in rows], of_group)
            except Exception as error:  # foreign code may raise anything
                errors.update(dict.fromkeys(rows, error))
                continue
            scores = found if at is None else scores.index_copy(0, at, found)
        return self._warpers(scores), errors


def levels_of(tree: TreeTensors) -> list[Levels]:
    """The nodes of each depth with their lineages, for each row of the tree. Syncs with the device."""
    return [
        [
            (level, lineage[level, : depth + 1])
            for depth in range(lineage.shape[1])
            if len(level := (depths == depth).nonzero()[:, 0])  # a dynamic tree need not reach every depth
        ]
        for depths, lineage in zip(tree.depths, tree.lineage, strict=True)
    ]


def uniforms(streams: Sequence[tuple[int, int]], length: int, device: torch.device) -> Tensor:
    """(rows, length) float64 in [0, 1): one stream (seed, number) per row, the same on every device and in any batch."""
    generators = [torch.Generator().manual_seed(_mix(seed, number)) for seed, number in streams]
    table = torch.stack([torch.rand(length, generator=generator, dtype=torch.float64) for generator in generators])
    return table.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _mix(seed: int, number: int) -> int:
    """A 63-bit generator seed from (seed, number), by two rounds of splitmix64, so that nearby seeds get unrelated streams."""
    mask = (1 << 64) - 1
    state = seed & mask
    for word in (0, number):
        state = (state ^ word) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


def choose(
    scores: Tensor,  # (B, N, V): logits after processors
    uniform: Tensor | None,  # (B, N) in [0, 1); None: nothing is drawn
) -> Tensor:  # (B, N) long
    """The backbone's token after every node: a draw, or the likeliest."""
    return scores.argmax(-1) if uniform is None else draw(scores.float(), uniform)


def draw(
    scores: Tensor,  # (B, N, V) float32: logits after processors; -inf is never drawn
    uniform: Tensor,  # (B, N) in [0, 1)
) -> Tensor:  # (B, N) long
    """One token per node by inversion: the first whose cumulative probability exceeds the uniform number.

    All nodes at a depth share the number of their token position. Only one node per depth is ever reached, so the output
    keeps the backbone's distribution; and the token at a position is a function of seed and context alone, whatever the
    tree: sampled Medusa output equals sampled plain output.
    """
    p = scores.softmax(-1)
    # In two levels, over blocks and then within one: a double-precision cumulative sum over the whole vocabulary is slow.
    if short := -p.shape[-1] % BLOCK:
        p = pad(p, (0, short))
    blocks = p.unflatten(-1, (-1, BLOCK))  # (B, N, V / BLOCK, BLOCK)
    sums = blocks.sum(-1).cumsum(-1, dtype=uniform.dtype)
    block, left = _invert(sums, uniform[..., None] * sums[..., -1:])
    inside = blocks.gather(2, block[..., None].expand(*block.shape, BLOCK)).squeeze(2).cumsum(-1, dtype=uniform.dtype)
    return (block * BLOCK + _invert(inside, left)[0]).squeeze(-1)


def _invert(
    cumulative: Tensor,  # (..., n), non-decreasing
    wanted: Tensor,  # (..., 1)
) -> tuple[Tensor, Tensor]:  # (..., 1) long, (..., 1)
    """The first index at which a cumulative sum exceeds a value, and the value minus the sum before it."""
    # Below the total by one rounding: the token found then has a positive probability, however the value was rounded.
    wanted = torch.minimum(wanted, cumulative[..., -1:] * (1 - torch.finfo(cumulative.dtype).eps))
    place = torch.searchsorted(cumulative, wanted, right=True).clamp(max=cumulative.shape[-1] - 1)
    before = cumulative.gather(-1, (place - 1).clamp(min=0)).where(place > 0, 0)
    return place, wanted - before
