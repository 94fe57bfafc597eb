"""CUDA graphs: the kernels of a function, recorded once and launched together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class CudaGraph:
    """A function on a GPU whose kernels are recorded once; a call launches all of them at once, without Python between them.

    A call copies the tensors of its arguments, in tuples and dataclasses, to where the kernels read them; they must have the
    shapes of those it was recorded with. All else, such as a cache, is used where it was. The next call overwrites the result.

    Args:
        function: does not wait for the GPU. It must have run before: libraries set themselves up when they are first used.
        args: arguments like those of the calls.
    """

    def __init__(self, function: Callable[..., Any], *args: Any):
        self._own = [tensor.clone() for tensor in tensors_of(args)]
        own = with_tensors(args, iter(self._own))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads may use the GPU
            self._result = function(*own)

    def __call__(self, *args: Any) -> Any:
        given: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for own, tensor in zip(self._own, tensors_of(args), strict=True):
            pair = given.setdefault(own.dtype, ([], []))
            pair[0].append(own)
            pair[1].append(tensor)
        for to, of in given.values():  # one kernel for each dtype
            torch._foreach_copy_(to, of)
        self._graph.replay()
        return self._result


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in vars(value).values():
            yield from tensors_of(part)


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors, in the order of `tensors_of`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        parts = [with_tensors(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: with_tensors(part, tensors) for name, part in vars(value).items()})
    return value
