"""The shortlist: the guesses of path heads from the root alone, scored again along each path (beyond the paper).

A head that reads a node's path would have to score the vocabulary once per node. But the R likeliest tokens of each depth,
given the root alone, include nearly all that are likely after any path. Only these are scored along a path, with R rows of the
LM head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa.heads import MedusaHeads
from medusa.trees.tensors import Along


def along_paths(
    heads: MedusaHeads,  # of kind "path"
    hidden: Tensor,  # (B, d), the dtype of the heads
    root: Tensor,  # (B,) long
    states: Tensor,  # (D, B, d): of the heads, from the root alone
    places: Tensor,  # (D, B, R) long, below V': the shortlists
    log_p: Tensor,  # (D, B, R) float32: their log-probabilities from the root alone
) -> Along:
    """A function that scores the shortlists along paths, to be called depth by depth."""
    first = heads.embed(root)[:, None]  # (B, 1, E)

    def along(depth: int, paths: Tensor) -> Tensor:
        lm_head = heads.lm_head(depth)
        weight = lm_head.weight[places[depth]]  # type: ignore[index]  # (B, R, d)
        batch, width, _ = paths.shape
        known = torch.cat([first.expand(batch, width, -1), heads.embed(paths).flatten(2)], -1)
        state = torch.cat([states[depth, :, None], heads.state(hidden[:, None], depth, known)], 1)
        scores = (
            state.to(weight.dtype) @ weight.transpose(1, 2)
        ).float()  # (B, 1 + W, R): from the root alone, then along each path
        if lm_head.bias is not None:
            scores = scores + lm_head.bias[places[depth]][:, None].float()  # type: ignore[index]
        total = (
            scores[:, :1, :1] - log_p[depth, :, None, :1]
        )  # the logarithm of the sum over the vocabulary, from the root alone
        return scores[:, 1:] - total

    return along
