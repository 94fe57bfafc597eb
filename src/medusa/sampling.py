"""Sampling: the backbone's distribution after logits processors, and one reproducible draw per tree node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa.kernels.build import are_loaded
from medusa.processors.warpers import RowWarpers, Warpers
from medusa.trees.guidance import Outlook
from medusa.trees.tensors import Draws, TreeTensors

BLOCK = 256  # tokens per block of the first level of `likeliest`
WORD = (1 << 32) - 1
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
Levels = list[tuple[Tensor, Tensor]]  # per depth d: nodes (n,) long, their lineages (n, d + 1) long
# The scores alone; also the row's tokens; also its tokens with padding; or the row's text and tree, all nodes at once.
Reads = Literal["scores", "tokens", "length", "tree"]


@dataclass(frozen=True)
class RowText:
    """The tokens of a row so far, for processors that read them."""

    tokens: Tensor  # (n,) long, left-padded
    pads: int
    prompt: int  # number of tokens of the prompt, padding included
    generated: Sequence[int]  # the tokens behind the prompt, on the host
    memory: dict[Any, Any]  # of the request: a processor may keep here what it has worked out of the tokens, under itself

    def behind(self, unseen: int) -> RowText:
        """The text without its first slots, which hold no tokens."""
        cut = replace(self, tokens=self.tokens[unseen:], pads=max(0, self.pads - unseen), prompt=self.prompt - unseen)
        return cut if unseen else self


class TreeProcessor(Protocol):
    """A logits processor that reads the tree of a row: a function of the text, the tokens of each path and the scores alone."""

    def __call__(self, scores: Tensor, text: RowText, paths: NodePaths | None) -> Tensor:
        """The scores (N, V) of all nodes; without paths, N = 1 and the scores follow the text."""


class Guide(Protocol):
    """A processor that knows before a step what may follow its root."""

    def outlook(self, text: RowText, root: int, most: int) -> Outlook: ...


@dataclass(frozen=True)
class Processors:
    """The logits processors of a row in order, and what each of them reads."""

    steps: tuple[tuple[LogitsProcessor | TreeProcessor, Reads], ...] = ()
    warpers: Warpers = field(default_factory=Warpers)  # after the steps
    unseen: int = 0  # leading slots of every text that hold no token (soft prompts); processors do not see them
    guide: Guide | None = None  # one of the steps, if it knows what may follow

    def __bool__(self) -> bool:
        return bool(self.steps or self.warpers)

    @property
    def read_paths(self) -> bool:
        """Whether one of them reads tokens."""
        return any(reads != "scores" for _, reads in self.steps)

    def __call__(
        self,
        logits: Tensor,  # (n, N, V)
        texts: Sequence[RowText | None],  # n; None: the row has finished
        rows: Sequence[int],  # n: the rows' numbers among those of the nodes
        nodes: NodePrefixes | None = None,  # None: N = 1, and the logits follow the texts
    ) -> Tensor:  # (n, N, V) float32
        """Scores of every node before the warpers: each processor sees the prefix of that node's own path."""
        scores = logits.float()
        for process, reads in self.steps:
            if reads == "scores":
                flat = scores.flatten(0, 1)
                scores = process(flat.new_empty((len(flat), 0), dtype=torch.long), flat).view_as(scores)  # type: ignore[call-arg, arg-type]
                continue
            scores = scores.clone()
            for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
                if text is None:
                    continue
                text = text.behind(self.unseen)
                if reads == "tree":
                    paths = None if nodes is None else NodePaths(nodes, row)
                    scores[place] = process(scores[place], text, paths)  # type: ignore[call-arg, arg-type]
                else:
                    prefix = text.tokens[text.pads :] if reads == "tokens" else text.tokens
                    _by_depth(process, scores[place], prefix, nodes, row)  # type: ignore[arg-type]
        return scores


def _by_depth(process: LogitsProcessor, scores: Tensor, prefix: Tensor, nodes: NodePrefixes | None, row: int) -> None:
    """Replace the scores of a row, (N, V), by those of a processor that takes texts of one length at a time."""
    if nodes is None:
        scores.copy_(process(prefix[None], scores))
        return
    for level, lineage in nodes.of(row):
        tail = nodes.tokens[row][lineage]  # (nodes of the level, depth + 1)
        ids = torch.cat([prefix.expand(len(tail), -1), tail], dim=1)
        scores[level] = process(ids, scores[level])


class NodePrefixes:
    """The tokens along the path of every node, for processors that read tokens.

    Args:
        tokens: (B, N) long.
        levels: the levels of a tree that is the same at every step.
    """

    def __init__(self, tokens: Tensor, tree: TreeTensors, levels: list[Levels] | None = None):
        self.tokens, self.tree = tokens, tree
        self._fixed = levels

    @cached_property
    def levels(self) -> list[Levels]:
        """The nodes by depth: for every row, or once for all."""
        return self._fixed or levels_of(self.tree)

    @cached_property
    def on_host(self) -> list[list[list[int]]]:  # B times (2, N): tokens and parents
        """Syncs with the device, once for all rows."""
        return torch.stack([self.tokens, self.tree.parents.expand_as(self.tokens)], 1).tolist()

    def of(self, row: int) -> Levels:
        return self.levels[row if len(self.levels) > 1 else 0]


@dataclass(frozen=True)
class NodePaths:
    """The tree of one row, for processors that read it."""

    nodes: NodePrefixes
    row: int

    @property
    def tokens(self) -> Tensor:  # (N,) long
        return self.nodes.tokens[self.row]

    @property
    def lineage(self) -> Tensor:  # (N, D + 1) long: the nodes from the root to the node, then -1
        lineage = self.nodes.tree.lineage
        return lineage[self.row if len(lineage) > 1 else 0]

    def on_host(self) -> tuple[list[int], list[int]]:
        """The token and the parent of every node."""
        tokens, parents = self.nodes.on_host[self.row]
        return tokens, parents


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
        self.guides = {row: own.guide for row, own in enumerate(processors) if own.guide is not None}
        self.readers = [row for own, rows, _ in self._groups if own.read_paths for row in rows]  # rows whose tokens are read

    def __call__(
        self,
        logits: Tensor,  # (B, N, V)
        texts: Mapping[int, RowText],  # of each reader, unless the row has finished
        nodes: NodePrefixes | None = None,  # None: N = 1, and the logits follow the texts
    ) -> tuple[Tensor, dict[int, Exception]]:
        """Scores of every node before the warpers (B, N, V), and the error of each row whose processor failed."""
        if not self._groups:
            return logits, {}
        scores, errors = logits.float(), {}
        for own, rows, at in self._groups:
            try:
                found = own(scores if at is None else scores[at], [texts.get(row) for row in rows], rows, nodes)
            except Exception as error:  # foreign code may raise anything
                errors.update(dict.fromkeys(rows, error))
                continue
            scores = found if at is None else scores.index_copy(0, at, found)
        return scores, errors

    def warp(
        self,
        scores: Tensor,  # (B, N, V)
    ) -> Tensor:  # (B, N, V), float32 if there are warpers
        return self._warpers(scores.float()) if self._warpers else scores


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


def row_keys(streams: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(rows,) long: one key per row from its stream (seed, number), the same on every device and in any batch."""
    return torch.tensor([_mix(seed, number) for seed, number in streams], device=device)


def position_keys(
    rows: Tensor,  # (...) long: keys of rows
    numbers: Tensor,  # (...) long: which token of its row, from 0
) -> Tensor:  # (...) long
    """One key per token position."""
    first = _scrambled(numbers + (rows & WORD)) ^ rows >> 32
    return (_scrambled(first) >> 1) << 32 | _scrambled(first + 0x9E3779B9)


def gumbel(
    keys: Tensor,  # (...) long: of positions
    tokens: Tensor,  # (...) long
) -> Tensor:  # (...) float32
    """A number per token at a position, distributed as Gumbel's: hashed, so that any of them can be had without the others."""
    word = _scrambled(_scrambled(tokens + (keys >> 32)) ^ keys & WORD)
    chance = ((word.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)  # in (0, 1), and fine near 0, where the great numbers are
    return -torch.log(-torch.log1p(-chance))


def keys_after(
    draws: Draws,
    lengths: Tensor,  # (B,) long: committed slots
    depths: Tensor,  # (..., B) long: of nodes
) -> Tensor:  # (..., B) long
    """The key of the token after a node: at depth d of a row that has emitted e tokens, the row's token number e + d + 1."""
    return position_keys(draws.keys, lengths - draws.starts + depths + 1)


def ahead(
    draws: Draws,
    lengths: Tensor,  # (B,) long: committed slots
    tokens: Tensor,  # (D, B, R) long: guesses of the D positions behind the root
) -> Tensor:  # (D, B, R) float32
    """What is added to the log-probabilities of tokens, times the temperature, before one of them is drawn."""
    keys = keys_after(draws, lengths, torch.arange(len(tokens), device=tokens.device)[:, None])  # (D, B)
    return gumbel(keys[..., None], tokens) * draws.temperatures[:, None]


def _scrambled(
    word: Tensor,  # long: its lowest 32 bits count
) -> Tensor:  # long, below 2^32
    """A permutation of the words of 32 bits in which every bit depends on every bit (Wellons' `lowbias32`, with multipliers of
    31 bits: no product overflows)."""
    word = word & WORD
    word = (word ^ word >> 16) * 0x21F0AAAD & WORD
    word = (word ^ word >> 15) * 0x735A2D97 & WORD
    return word ^ word >> 15


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
    keys: Tensor | None,  # (B, N) long: of positions; None: nothing is drawn
) -> Tensor:  # (B, N) long
    """The backbone's token after every node: a draw, or the likeliest."""
    return likeliest(scores) if keys is None else draw(scores.float(), keys)


def likeliest(
    scores: Tensor,  # (B, N, V)
) -> Tensor:  # (B, N) long
    """The token with the greatest score, the first if several have it."""
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    # On a CPU argmax goes through single elements (eight rows of 49,152 in bfloat16: 1.3 ms), the maximum of a block does not.
    blocks = _in_blocks(scores, -torch.inf)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    return (block * BLOCK + _one_block(blocks, block).argmax(-1, keepdim=True)).squeeze(-1)


def draw(
    scores: Tensor,  # (B, N, V) float32: logits after processors; -inf is never drawn
    keys: Tensor,  # (B, N) long: of positions
) -> Tensor:  # (B, N) long
    """One token per node: the greatest score plus Gumbel number (the Gumbel-max trick), which is a draw from their softmax.

    All nodes at a depth share the key of their token position. Only one node per depth is ever reached, so the output keeps
    the backbone's distribution; and the token at a position is a function of seed and context alone, whatever the tree:
    sampled Medusa output equals sampled plain output. The tree may therefore depend on the same numbers (`ahead`).
    """
    if scores.device.type == "cpu" and are_loaded():
        return torch.ops.medusa.draw(scores.flatten(0, 1), keys.flatten()).view_as(keys)
    return likeliest(scores + gumbel(keys[..., None], torch.arange(scores.shape[-1], device=scores.device)))


def _in_blocks(
    values: Tensor,  # (B, N, V)
    filling: float,  # of the last block
) -> Tensor:  # (B, N, ceil(V / BLOCK), BLOCK)
    short = -values.shape[-1] % BLOCK
    return (pad(values, (0, short), value=filling) if short else values).unflatten(-1, (-1, BLOCK))


def _one_block(
    blocks: Tensor,  # (B, N, n, BLOCK)
    block: Tensor,  # (B, N, 1) long
) -> Tensor:  # (B, N, BLOCK)
    return blocks.gather(2, block[..., None].expand(*block.shape, BLOCK)).squeeze(2)
