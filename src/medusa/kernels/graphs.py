"""Graphs: functions compiled ahead of time for arguments of one shape, kept on disk for other processes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from medusa.kernels.build import cache_folder, cpu_features
from medusa.runs.files import digest

Graph = Callable[..., Any]

MOST_BYTES = 1 << 30  # of the graphs on disk; above, those that were used longest ago are removed


def compile_graph(function: Callable[..., Any], args: tuple[Any, ...], backend: str | Callable[..., Any]) -> Graph:
    """Compile a function for arguments like these. The graph takes others unchecked: give it those of the same shapes alone.

    Args:
        backend: that of torch.compile.
    """
    options: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled: Any = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)
    graph = compiled.aot_compile((args, {}))
    graph.disable_guard_check()
    return graph


def graph_name(*of: Any) -> str:
    """A name on disk: a digest of what a graph depends on, given as JSON values, and of this machine and its software."""
    software = platform.python_version(), torch.__version__, transformers.__version__
    return digest([of, software, cpu_features(), torch.get_num_threads()])


def save_graph(graph: Graph, name: str) -> None:
    """Keep a graph on disk. If that fails, another process compiles it again."""
    with suppress(Exception):  # of a graph that cannot be pickled, too
        path = _path(name)
        graph.save_compiled_function(str(path))  # type: ignore[attr-defined]
        kept = 0
        for each in sorted(path.parent.glob("*.graph"), key=lambda file: file.stat().st_mtime, reverse=True):
            kept += each.stat().st_size
            if kept > MOST_BYTES:
                each.unlink()


def load_graph(name: str, function: Callable[..., Any]) -> Graph:
    """A function's graph that `save_graph` kept; an exception of any kind if there is none that can be read.

    It is a pickle, as trusted as the code that inductor keeps in its own cache: this user alone writes both.
    """
    path = _path(name)
    with path.open("rb") as file:
        graph = torch.compiler.load_compiled_function(file, f_globals=function.__globals__)
    graph.disable_guard_check()  # type: ignore[attr-defined]
    os.utime(path)
    return graph


def _path(name: str) -> Path:
    return cache_folder("graphs") / f"{name}.graph"
