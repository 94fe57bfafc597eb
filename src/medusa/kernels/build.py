"""Building: the C++ kernels become operators of torch, compiled once per machine and kept on disk."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from medusa.runs.files import digest

SOURCE = Path(__file__).with_name("few_rows.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
MOST_RESULTS = 4  # of `medusa::calls`


@functools.cache
def load_kernels() -> bool:
    """Load the kernels as `torch.ops.medusa`, and compile them first where this machine has not yet (about ten seconds).

    Returns False, with a warning, if there is no C++ compiler or it fails; torch.compile needs one on a CPU as well.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return _without("no C++ compiler was found; install g++ or set CXX")
    try:
        torch.ops.load_library(_compiled(compiler))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
        return _without(next((line for line in lines if "error:" in line), lines[0])[:200])
    torch.library.register_fake("medusa::linear", _fake)
    torch.library.register_fake("medusa::linear_rounded", _fake_rounded)
    torch.library.register_fake("medusa::calls", _fake_calls)
    torch.library.register_fake("medusa::linear_rows", _fake_rows)
    torch.library.register_fake("medusa::attention", _fake_attention)
    torch.library.register_fake("medusa::attend", lambda q, *_: q.new_empty(q.shape))
    torch.library.register_fake("medusa::computed", torch.empty_like)
    return True


def are_loaded() -> bool:
    """Whether `load_kernels` has loaded them. It takes time, so that only compiled steps and quantised maps ask for it."""
    return load_kernels.cache_info().currsize > 0 and load_kernels()


@functools.cache
def source_digest() -> str:
    """A digest of the kernels' source and of this file, which tells torch the layout of their results."""
    return digest([SOURCE.read_text(), Path(__file__).read_text()])


def _without(reason: str) -> bool:
    warnings.warn(f"the CPU kernels are not available, slower ones are used: {reason}", RuntimeWarning, stacklevel=3)
    return False


def _compiled(compiler: str) -> Path:
    """The shared library, compiled if it is not in the cache."""
    from torch.utils.cpp_extension import include_paths

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    name = digest([source_digest(), torch.__version__, version, FLAGS, cpu_features()])
    folder = cache_folder("kernels")
    library = folder / f"{name}.so"
    with FileLock(folder / f"{name}.lock"):
        if not library.exists():
            libraries = Path(torch.__file__).parent / "lib"
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                output = Path(scratch) / library.name
                includes = [f"-I{path}" for path in include_paths()]
                linked = [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
                command = [compiler, *FLAGS, "-DAT_PARALLEL_OPENMP=1", *includes, str(SOURCE), "-o", str(output), *linked]
                subprocess.run(command, capture_output=True, text=True, check=True)
                output.replace(library)
    return library


def cache_folder(name: str) -> Path:
    """The folder of what is compiled on this machine, made if it is missing."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medusa" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def cpu_features() -> str:
    """The processor's features: a home folder may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _fake(x: Tensor, weights: list[Tensor], biases: list[Tensor], *rest: Any, **around: Any) -> list[Tensor]:
    return _outputs(x, [weight.shape[0] for weight in weights], *rest, **around)


def _fake_rounded(
    x: Tensor, weights: list[Tensor], scales: list[Tensor], sizes: list[int], biases: list[Tensor], *rest: Any, **around: Any
) -> list[Tensor]:
    return _outputs(x, sizes, *rest, **around)


def _outputs(x: Tensor, sizes: list[int], gated: bool = False, added: Tensor | None = None, *_: Any, **__: Any) -> list[Tensor]:
    outputs = [x.new_empty(*x.shape[:-1], size) for size in (sizes[:1] if gated else sizes)]
    return outputs if added is None else [*outputs, x.new_empty(x.shape)]


def _fake_calls(given: list[Tensor], caches: list[Tensor], factors: list[float], program: list[int]) -> Any:
    tensors: list[Any] = [*given, *caches]
    numbers = iter(program)

    def several() -> list[int]:
        return [next(numbers) for _ in range(next(numbers))]

    for _ in factors:
        kind, x = next(numbers), tensors[next(numbers)]
        if kind == 2:  # an attention, and its other tensors
            tensors.append(x.new_empty(x.shape))
            _others = [next(numbers) for _ in range(8)]
            continue
        weights, _scales, sizes, _biases = several(), several(), several(), several()
        gated, added, _scale = next(numbers), next(numbers), next(numbers)
        sizes = sizes if kind else [tensors[weight].shape[0] for weight in weights]
        tensors += _outputs(x, sizes, bool(gated), None if added < 0 else tensors[added])
    wanted = [tensors[number] for number in several()]
    return (*wanted, *(given[0].new_empty(0) for _ in range(MOST_RESULTS - len(wanted))))


def _fake_rows(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows.shape[1])


def _fake_attention(queries: Tensor, *_: Any) -> Tensor:
    batch, heads, rows, width = queries.shape
    return queries.new_empty(batch, rows, heads, width).transpose(1, 2)
