"""Compiled steps: one graph for each shape, used only if it computes the same as the uncompiled step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from medusa.backbone.probe import NOISE_MULTIPLE, relative_difference
from medusa.kernels.build import load_kernels
from medusa.kernels.fusion import few_rows_backend
from medusa.trees.history import History
from medusa.trees.tensors import Drafted, Drafter, Frame

LEAST_LIMIT = 1e-3  # of the logits' spread: compilers reorder sums, even if the model's own passes do not


class Compiled:
    """A model whose `draft_and_verify` runs through torch.compile, with static shapes, and with CUDA graphs on a GPU.

    If a shape does not compile, or its graph computes something else, it warns once and runs uncompiled.

    Args:
        model: the model itself, a `medusa.decoding.Decodable`.
        noise: how far two passes of the model over the same tokens may differ, relative to the spread of its logits.
    """

    static_shapes = True

    def __init__(self, model: Any, noise: float):
        self._model = model
        self._noise = noise
        self._compiled: Callable[..., Drafted] | None = None
        self._usable: dict[tuple[float, ...], bool] = {}  # by shape

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look these up before `_model` is set
            raise AttributeError(name)
        return getattr(self._model, name)

    def draft_and_verify(
        self, root: Tensor, hidden: Tensor, drafter: Drafter, history: History | None, frame: Frame, cache: Any
    ) -> Drafted:
        args = (root, hidden, drafter, history, frame, cache)
        shape = (len(root), *drafter.shape, frame.visible, 0 if history is None else history.table.shape[1])
        if shape not in self._usable:
            self._usable[shape] = self._compile(root.device, args)
        return self._run(root.device, args) if self._usable[shape] else self._model.draft_and_verify(*args)

    def _run(self, device: torch.device, args: tuple) -> Drafted:
        assert self._compiled is not None
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(*args)

    def _compile(self, device: torch.device, args: tuple) -> bool:
        """Compile for one shape; False, with a warning, if that fails or computes something else."""
        if self._compiled is None:
            self._compiled = _compiled(self._model.draft_and_verify, device)
        try:
            # Every tree, batch and capacity has its own graph; by default dynamo stops at eight.
            with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
                _check(self._run(device, args), self._model.draft_and_verify(*args), self._noise)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise errors of many kinds
            cause = str(error.__cause__ or error).strip() or type(error).__name__
            warnings.warn(
                f"torch.compile failed, decoding continues uncompiled: {cause.splitlines()[0][:200]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True


def _compiled(method: MethodType, device: torch.device) -> Callable[..., Drafted]:
    """A model's method through torch.compile, with graphs of its own."""
    # Dynamo keeps graphs with the code of a function: with code of its own, a model never meets the graphs of another.
    code = method.__func__.__code__.replace()
    function = FunctionType(code, method.__func__.__globals__, closure=method.__func__.__closure__)
    method = MethodType(function, method.__self__)
    # The model does not change (see `TreeLM`): checking at every step that it has not costs a millisecond.
    unchanged: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    if device.type == "cuda":
        unchanged |= torch._inductor.list_mode_options("reduce-overhead")
    elif device.type == "cpu" and load_kernels():
        return torch.compile(method, fullgraph=True, dynamic=False, backend=few_rows_backend, options=unchanged)
    return torch.compile(method, fullgraph=True, dynamic=False, options=unchanged)


def _check(got: Drafted, wanted: Drafted, noise: float) -> None:
    """Raise if compiled code computes something else: compilers have been wrong (see `TreeLM._tree_masks`)."""
    agreed = (got.tokens == wanted.tokens) & (got.tree.parents == wanted.tree.parents)  # heads may break a near-tie differently
    same = (agreed[:, None] | ~wanted.tree.ancestors).all(-1)
    difference = relative_difference(got.logits[same], wanted.logits[same])
    limit = max(LEAST_LIMIT, NOISE_MULTIPLE * noise)
    if not difference < limit:
        raise RuntimeError(
            f"the compiled step's logits differ from the uncompiled one's by {difference:.1e} (limit {limit:.1e})"
        )
