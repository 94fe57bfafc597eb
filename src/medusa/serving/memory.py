"""Memory: how large a pool of slots is, and how many slots fit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from medusa.batch.state import Decodable
from medusa.errors import InvalidInput
from medusa.serving.settings import MOST_SLOTS

USUAL_CAPACITY = 4096  # tokens, if the model's context is not shorter
LEAST_CAPACITY = 256
SHARE = 0.5  # of the free memory, by default


@dataclass(frozen=True)
class PoolSize:
    """The size of a pool."""

    slots: int
    capacity: int  # tokens that a slot holds
    token_bytes: int  # of the keys and values of one token, in all layers

    @property
    def bytes(self) -> int:
        return self.slots * self.capacity * self.token_bytes


def pool_size(model: Decodable, slots: int | None = None, capacity: int | None = None, free: int | None = None) -> PoolSize:
    """The size of a pool; what is left open is chosen to take at most half of the free memory.

    Args:
        slots: number of slots; None: as many as fit, at most 16.
        capacity: number of tokens that a slot holds; None: the model's context, at most 4096.
        free: bytes that are free; None: what the device reports.

    Raises:
        InvalidInput: a number is out of range, or the pool does not fit the free memory.
    """
    for name, value in (("slots", slots), ("capacity", capacity)):
        if value is not None and value < 1:
            raise InvalidInput(f"{name} is {value}, expected at least 1")
    free = free_bytes(model.device) if free is None else free
    each = token_bytes(model)
    tokens = int(SHARE * free) // each  # that fit, of all slots
    if capacity is None:
        longest = min(model.max_length or USUAL_CAPACITY, USUAL_CAPACITY)
        capacity = max(min(longest, LEAST_CAPACITY), min(longest, tokens // (slots or 1)))
    if slots is None:
        slots = max(1, min(MOST_SLOTS, tokens // capacity))
    size = PoolSize(slots, capacity, each)
    if size.bytes > free:
        raise InvalidInput(
            f"{slots} slots of {capacity} tokens take {size.bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; lower --slots "
            f"or --capacity: {free // each} tokens fit in all"
        )
    return size


@torch.inference_mode()
def token_bytes(model: Decodable) -> int:
    """Bytes of the keys and values of one token in all layers, from what the model writes into its cache."""
    cache = model.new_cache(1)
    model.prefill(torch.zeros(1, 1, dtype=torch.long, device=model.device), None, cache)
    return cache.bytes


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    report = Path("/proc/meminfo")
    if report.is_file():  # counts what the system would give up of its caches
        lines = dict(line.split(":", 1) for line in report.read_text().splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
