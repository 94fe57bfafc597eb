"""Pages: weights that every step reads stay in large pages of memory, whose addresses a processor finds sooner."""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

LARGE = 2 << 20  # bytes
MADV_COLLAPSE = 25  # Linux 6.1


def use_large_pages(tensors: Iterable[Tensor]) -> None:
    """Ask Linux to move tensors on a CPU into pages of 2 MiB, in place of 4 KiB. Where it cannot, nothing changes.

    A step reads all weights once, and with small pages much of that time goes into finding them: on two virtual cores, maps of
    one token took 1.2 times as long. Nothing is copied for good, and addresses stay.
    """
    if (library := _libc()) is None:
        return
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    pages = {page for s in storages for page in range(s.data_ptr() // LARGE, -(-(s.data_ptr() + s.nbytes()) // LARGE))}
    # Neighbours together: each call first waits for all cores, milliseconds long.
    for first in sorted(page for page in pages if page - 1 not in pages):
        count = next(count for count in itertools.count(1) if first + count not in pages)
        library.madvise(ctypes.c_void_p(first * LARGE), ctypes.c_size_t(count * LARGE), MADV_COLLAPSE)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
