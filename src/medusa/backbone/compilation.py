"""Compiled steps: one graph a shape, used only where it computes what the uncompiled step computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from medusa.backbone.probe import NOISE_MULTIPLE, relative_difference
from medusa.trees.tensors import TreeTensors

Step = tuple[Tensor, TreeTensors, Tensor, Tensor]  # tokens (B, N), the tree, hidden states (B, N, d), logits (B, N, V)
LEAST_LIMIT = 1e-3  # of the logits' spread: compilers reorder sums even where the model's own passes do not


class CompiledStep:
    """`draft_and_verify` through torch.compile, with static shapes, and with CUDA graphs on a GPU.

    Where a shape does not compile, or computes something else, it says so once and runs uncompiled.

    Args:
        step: the uncompiled step, of (root, hidden, drafter, context, base, lengths, pads, visible, cache).
        noise: how far the model's logits are from themselves when computed otherwise, relative to their spread.
    """

    def __init__(self, step: Callable[..., Step], noise: float):
        self._step = step
        self._noise = noise
        self._compiled: Callable[..., Step] | None = None
        self._usable: dict[tuple[float, ...], bool] = {}  # by shape

    def __call__(self, *args) -> Step:
        root, _, drafter, context, *_, visible, _ = args
        shape = (len(root), *drafter.shape, visible, 0 if context is None else context.table.shape[1])
        if shape not in self._usable:
            self._usable[shape] = self._compile(root.device, args)
        return self._run(root.device, args) if self._usable[shape] else self._step(*args)

    def _run(self, device: torch.device, args: tuple) -> Step:
        assert self._compiled is not None
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(*args)

    def _compile(self, device: torch.device, args: tuple) -> bool:
        """Compile for one shape; False, with a warning, where that fails or computes something else."""
        if self._compiled is None:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            self._compiled = torch.compile(self._step, fullgraph=True, dynamic=False, mode=mode)
        try:
            # Every tree, batch and capacity is a graph of its own, and dynamo stops at eight unless told otherwise.
            with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
                _check(self._run(device, args), self._step(*args), self._noise)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in ways of their own
            cause = str(error.__cause__ or error).strip() or type(error).__name__
            warnings.warn(
                f"torch.compile failed, decoding goes on uncompiled: {cause.splitlines()[0][:200]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True


def _check(got: Step, wanted: Step, noise: float) -> None:
    """Raise where compiled code computes something else: compilers have been wrong (see `Backbone._tree_masks`)."""
    agreed = (got[0] == wanted[0]) & (got[1].parents == wanted[1].parents)  # heads may break a near-tie the other way
    same = (agreed[:, None] | ~wanted[1].ancestors).all(-1)
    difference, limit = relative_difference(got[3][same], wanted[3][same]), max(LEAST_LIMIT, NOISE_MULTIPLE * noise)
    if not difference < limit:
        raise RuntimeError(
            f"the compiled step's logits differ from the uncompiled one's by {difference:.1e} (limit {limit:.1e})"
        )
