"""Workers: the threads that OpenMP keeps for each thread that computes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

MAPPED = Path("/proc/self/maps")
SOFT = 1  # omp_pause_soft


def release_workers() -> None:
    """End the workers of this thread; the next computation makes new ones, in a tenth of a millisecond.

    GNU's OpenMP gives each thread workers of its own, for as long as it lives. If all together are more than the cores, none
    waits for work by spinning any more, and each parallel loop wakes them from sleep: on two cores a compiled step took 1.7
    times as long in a second thread. A thread that will not compute soon releases its own, so that others do not wait for them.
    """
    if (library := _openmp()) is not None:
        library.omp_pause_resource_all(SOFT)


@functools.cache
def _openmp() -> Any:
    """The GNU OpenMP library that torch computes with; None: it uses another, or none."""
    lines = MAPPED.read_text(encoding="utf-8").splitlines() if MAPPED.exists() else []
    path = next((line.split(maxsplit=5)[-1] for line in lines if Path(line).name.startswith("libgomp")), None)
    library = ctypes.CDLL(path) if path is not None else None
    return library if hasattr(library, "omp_pause_resource_all") else None
