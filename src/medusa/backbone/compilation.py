"""Compiled steps: one graph for each shape, used only if it computes the same as the uncompiled step."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import medusa
from medusa.backbone.cache import TreeCache
from medusa.backbone.probe import NOISE_MULTIPLE, relative_difference
from medusa.errors import one_line
from medusa.kernels.build import load_kernels
from medusa.kernels.cuda_graphs import CudaGraph
from medusa.kernels.fusion import few_rows_backend
from medusa.kernels.graphs import Graph, compile_graph, graph_name, load_graph, save_graph
from medusa.kernels.pages import use_large_pages
from medusa.runs.files import digest
from medusa.trees.history import History
from medusa.trees.tensors import Drafted, Drafter, Frame

MOST_GRAPHS = 256  # the oldest is removed first
MOST_CACHES = 2  # of ended requests, held for the next ones
LEAST_LIMIT = 1e-3  # of the logits' spread: compilers reorder sums, even if the model's own passes do not


class Compiled:
    """A model whose `draft_and_verify` is a graph for each shape: on a CPU made by torch.compile, and kept on disk for other
    processes; on a GPU the same kernels as ever, recorded once and launched together.

    If a shape has no graph, or its graph computes something else, it warns once and runs uncompiled.

    Args:
        model: the model itself, a `medusa.decoding.Decodable`.
        noise: how far two passes of the model over the same tokens may differ, relative to the spread of its logits.
    """

    static_shapes = True

    def __init__(self, model: Any, noise: float):
        self._model = model
        self._noise = noise
        self._graphs: dict[Any, Graph | None] = {}  # by shapes of the arguments; None: runs uncompiled
        self._caches: deque[tuple[weakref.ref, list]] = deque(maxlen=MOST_CACHES)  # with their layers
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look these up before `_model` is set
            raise AttributeError(name)
        return getattr(self._model, name)

    def new_cache(self, capacity: int, rows: int | None = None) -> TreeCache:
        """A cache. If the number of rows is given, perhaps the memory of an ended request's, for which a GPU has graphs."""
        cache = self._model.new_cache(capacity)
        if rows is not None:
            with self._lock:
                for entry in self._caches:
                    used, layers = entry
                    first = layers[0]
                    if used() is None and first.is_initialized and (first.capacity, len(first.keys)) == (capacity, rows):
                        self._caches.remove(entry)
                        cache.take(layers)
                        break
                self._caches.append((weakref.ref(cache), cache.layers))
        return cache

    def draft_and_verify(
        self, root: Tensor, hidden: Tensor, drafter: Drafter, history: History | None, frame: Frame, cache: Any
    ) -> Drafted:
        args = (root, hidden, drafter, history, frame, cache)
        key = shapes = shapes_of(args)
        if root.is_cuda and shapes not in self._graphs:  # there, a shape without graphs has one entry for all caches
            key = (*shapes, *addresses_of(cache))
        if key not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            made = self._graph(shapes, args)
            key = shapes if made is None else key
            self._graphs[key] = made
        graph = self._graphs[key]
        return graph(self._model, *args) if graph is not None else self._model.draft_and_verify(*args)

    def _graph(self, shapes: Any, args: tuple) -> Graph | None:
        """The graph of one shape; None, with a warning, if it does not compile or computes something else."""
        device = args[0].device.type
        wanted = self._model.draft_and_verify(*args)

        def right(graph: Graph) -> Graph:
            _check(graph(self._model, *args), wanted, self._noise)
            return graph

        try:
            if device == "cuda":
                return right(CudaGraph(type(self._model).draft_and_verify, self._model, *args))
            few_rows = device == "cpu" and self._prepared
            name = graph_name(self._identity, repr(shapes), few_rows)
            with suppress(Exception):  # there is none, it is damaged, or it was made of something else
                return right(functools.partial(load_graph(name, _step), self._weights))
            backend = few_rows_backend if few_rows else "inductor"
            made = compile_graph(_step, (self._weights, self._model, *args), backend)
            graph = right(functools.partial(made, self._weights))
            save_graph(made, name)
            return graph
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise errors of many kinds
            cause = one_line(error.__cause__ or error)
            what = "recording a CUDA graph" if device == "cuda" else "torch.compile"
            warnings.warn(f"{what} failed, decoding continues uncompiled: {cause}", RuntimeWarning, stacklevel=2)
            return None

    @functools.cached_property
    def _prepared(self) -> bool:
        """Prepare a CPU, once: load the kernels, and move the weights to large pages. False if there are no kernels."""
        use_large_pages(self._weights)
        return load_kernels()

    @property
    def _parts(self) -> list[nn.Module]:
        model = self._model
        return [model.backbone] if model.heads is None else [model.backbone, model.heads]

    @functools.cached_property
    def _weights(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self._parts for tensor in (*part.parameters(), *part.buffers()))

    @functools.cached_property
    def _identity(self) -> list[str]:
        """What a graph depends on besides the shapes of its arguments: this package, and the model without its weights."""
        model, parts = self._model, self._parts
        held = [(n, t.shape, t.stride(), t.dtype) for part in parts for n, t in part.state_dict(keep_vars=True).items()]
        config = model.backbone.config.to_dict() | {"_name_or_path": None}
        sources = [inspect.getsourcefile(type(model.lm.decoder)), *sorted(Path(medusa.__file__).parent.rglob("*.py"))]
        texts = [Path(path).read_text(encoding="utf-8") for path in sources if path is not None]
        heads = None if model.heads is None else vars(model.heads.config)
        return [digest(texts), repr(config), repr(heads), model.lm.attention, repr(parts), repr(held)]


def _step(weights: tuple[Tensor, ...], model: Any, *args: Any) -> Drafted:
    """The step that a graph is made of. It meets the weights in a tuple first, so the graph takes them from there: on the way
    through the modules, the 330 of SmolLM2 take Python 0.3 ms."""
    for weight in weights:
        weight.shape  # noqa: B018
    return model.draft_and_verify(*args)


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


def addresses_of(cache: TreeCache) -> tuple[int, ...]:
    """Where a cache stands, which a graph on a GPU depends on."""
    return tuple(states.data_ptr() for layer in cache.layers if layer.is_initialized for states in (layer.keys, layer.values))


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
