"""Compiled steps: one graph for each shape, used only if it computes the same as the uncompiled step."""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

import medusa
from medusa.backbone.cache import TreeCache
from medusa.backbone.probe import NOISE_MULTIPLE, relative_difference
from medusa.errors import one_line
from medusa.kernels.build import load_kernels
from medusa.kernels.fusion import few_rows_backend
from medusa.kernels.graphs import Graph, compile_graph, graph_name, load_graph, save_graph
from medusa.runs.files import digest
from medusa.trees.history import History
from medusa.trees.tensors import Drafted, Drafter, Frame

LEAST_LIMIT = 1e-3  # of the logits' spread: compilers reorder sums, even if the model's own passes do not


class Compiled:
    """A model whose `draft_and_verify` runs through torch.compile, with static shapes, and with CUDA graphs on a GPU.

    If a shape does not compile, or its graph computes something else, it warns once and runs uncompiled. On a CPU, graphs are
    kept on disk, where another process finds them.

    Args:
        model: the model itself, a `medusa.decoding.Decodable`.
        noise: how far two passes of the model over the same tokens may differ, relative to the spread of its logits.
    """

    static_shapes = True

    def __init__(self, model: Any, noise: float):
        self._model = model
        self._noise = noise
        self._graphs: dict[Any, Graph | None] = {}  # by shapes of the arguments; None: runs uncompiled

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look these up before `_model` is set
            raise AttributeError(name)
        return getattr(self._model, name)

    def draft_and_verify(
        self, root: Tensor, hidden: Tensor, drafter: Drafter, history: History | None, frame: Frame, cache: Any
    ) -> Drafted:
        args = (root, hidden, drafter, history, frame, cache)
        shapes = shapes_of(args)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._graph(shapes, args)
        graph = self._graphs[shapes]
        return graph(self._model, *args) if graph is not None else self._model.draft_and_verify(*args)

    def _graph(self, shapes: Any, args: tuple) -> Graph | None:
        """The graph of one shape; None, with a warning, if it does not compile or computes something else."""
        function, device = type(self._model).draft_and_verify, args[0].device.type
        wanted = self._model.draft_and_verify(*args)

        def right(graph: Graph) -> Graph:
            _check(graph(self._model, *args), wanted, self._noise)
            return graph

        try:
            if device == "cuda":
                # Every tree, batch and capacity has its own graph; by default dynamo stops at eight.
                with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
                    return right(self._cuda_graphs)
            few_rows = device == "cpu" and load_kernels()
            name = graph_name(self._identity, repr(shapes), few_rows)
            with suppress(Exception):  # there is none, it is damaged, or it was made of something else
                return right(load_graph(name, function))
            graph = right(compile_graph(function, (self._model, *args), few_rows_backend if few_rows else "inductor"))
            save_graph(graph, name)
            return graph
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise errors of many kinds
            cause = one_line(error.__cause__ or error)
            warnings.warn(f"torch.compile failed, decoding continues uncompiled: {cause}", RuntimeWarning, stacklevel=2)
            return None

    @functools.cached_property
    def _cuda_graphs(self) -> Graph:
        """The step of all shapes on a GPU: dynamo finds the graph of each."""
        # Dynamo keeps graphs with the code of a function: with code of its own, a model never meets the graphs of another.
        of = type(self._model).draft_and_verify
        function = FunctionType(of.__code__.replace(), of.__globals__, closure=of.__closure__)
        # The model does not change (see `TreeLM`): checking at every step that it has not costs a millisecond.
        options = torch._inductor.list_mode_options("reduce-overhead") | {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe
        }
        compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)

        def run(*args: Any) -> Drafted:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(*args)

        return run

    @functools.cached_property
    def _identity(self) -> list[str]:
        """What a graph depends on besides the shapes of its arguments: this package, and the model without its weights."""
        model = self._model
        parts: list[nn.Module] = [model.backbone] if model.heads is None else [model.backbone, model.heads]
        held = [(n, t.shape, t.stride(), t.dtype) for part in parts for n, t in part.state_dict(keep_vars=True).items()]
        config = model.backbone.config.to_dict() | {"_name_or_path": None}
        sources = [inspect.getsourcefile(type(model.lm.decoder)), *sorted(Path(medusa.__file__).parent.rglob("*.py"))]
        texts = [Path(path).read_text(encoding="utf-8") for path in sources if path is not None]
        heads = None if model.heads is None else vars(model.heads.config)
        return [digest(texts), repr(config), repr(heads), model.lm.attention, repr(parts), repr(held)]


def shapes_of(value: Any) -> Any:
    """The layout of all tensors in an argument of the step, and all else as it is: what a graph is made for."""
    if isinstance(value, Tensor):
        strides = (stride if size > 1 else 0 for size, stride in zip(value.shape, value.stride(), strict=True))
        return value.shape, *strides, value.dtype, value.device
    if isinstance(value, tuple):
        return tuple(map(shapes_of, value))
    if isinstance(value, TreeCache):
        return value.capacity, shapes_of(value.layers[0].keys)
    if is_dataclass(value):  # the drafter, the history
        return type(value), *map(shapes_of, vars(value).values())
    return value


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
