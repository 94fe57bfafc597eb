"""The KV cache of a request: allocated once, written at given slots, compacted in place to the accepted paths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa.backbone.ranks import Ranks, repeated
from medusa.kernels.build import are_loaded


class _Cursor:
    """Where the next forward pass writes and how far it reads. All layers of a cache share one."""

    slots: Tensor | None = None  # (n,) long: slots of the tokens being processed
    visible: int = 0  # keys and values returned: slots 0 .. visible - 1


class TreeCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, kv heads, capacity, head dim). Full length even if attention is windowed: a ring
    buffer cannot hold a tree, so the mask does the windowing."""

    is_compileable = True
    is_sliding = False

    def __init__(self, capacity: int, cursor: _Cursor):
        super().__init__()
        self.capacity = capacity
        self.cursor = cursor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.allocate(key_states, value_states, len(key_states))

    def allocate(self, key_states: Tensor, value_states: Tensor, batch: int) -> None:
        """Allocate `batch` rows for keys and values like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, width = states.shape
            # zeros, not empty: slots not yet written are masked, but 0 * NaN would still be NaN
            setattr(self, name, states.new_zeros(batch, heads, self.capacity, width))
        self.is_initialized = True

    def grow(self, capacity: int) -> None:
        self.capacity = capacity
        if self.is_initialized:
            for name in ("keys", "values"):
                states = getattr(self, name)
                setattr(self, name, pad(states, (0, 0, 0, capacity - states.shape[2])))

    def rows(self, start: int, stop: int) -> TreeCacheLayer:
        """Rows start .. stop - 1; both share their keys and values."""
        part = TreeCacheLayer(self.capacity, self.cursor)
        if self.is_initialized:
            part.dtype, part.device, part.is_initialized = self.dtype, self.device, True
            for name in ("keys", "values"):
                setattr(part, name, getattr(self, name)[start:stop])
        return part

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.cursor.slots is not None, "aim the cache before a forward pass"
        slots = self.cursor.slots.to(self.keys.device)
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        visible = self.cursor.visible
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.visible, 0

    def get_seq_length(self) -> int:
        return 0  # read only to make positions and masks, which we give, but for a prefill's

    def get_max_length(self) -> int:
        return self.capacity


class TreeCache(Cache):
    """Preallocated layers for `capacity` slots a row. Row b's committed tokens are slots pad_b .. length_b - 1."""

    def __init__(self, num_layers: int, capacity: int, ranks: Ranks | None = None):
        self.cursor = _Cursor()
        self.capacity, self.ranks = capacity, ranks
        super().__init__(layers=[TreeCacheLayer(capacity, self.cursor) for _ in range(num_layers)])

    def aim(self, slots: Tensor, visible: int) -> None:
        """Set the slots that the next forward pass writes to, and the number of slots it sees."""
        self.cursor.slots, self.cursor.visible = slots, visible

    @repeated
    def keep(
        self,
        source: Tensor,  # (B, n) long: slots to keep, in order
        target: Tensor,  # (B, n) long: where they go
    ) -> None:
        """Move keys and values within each row; the targets are overwritten."""
        held = [layer for layer in self.layers if layer.is_initialized]  # layers that share another's cache have no own
        if are_loaded() and {source.device.type, *(layer.device.type for layer in held)} == {"cpu"}:
            torch.ops.medusa.move_slots([states for layer in held for states in (layer.keys, layer.values)], source, target)
            return
        for layer in held:
            device = layer.keys.device
            rows = torch.arange(source.shape[0], device=device)[:, None]
            at, to = source.to(device), target.to(device)
            layer.keys[rows, :, to] = layer.keys[rows, :, at]
            layer.values[rows, :, to] = layer.values[rows, :, at]

    @repeated
    def place(
        self,
        other: TreeCache,
        rows: Tensor,  # (n,) long: target rows of the other cache's n rows
        batch: int,  # number of rows to allocate, if nothing has been written yet
    ) -> None:
        """Copy all rows of another cache into some rows of this one."""
        for layer, source in zip(self.layers, other.layers, strict=True):
            if not source.is_initialized:
                continue
            if not layer.is_initialized:
                layer.allocate(source.keys, source.values, batch)
            layer.keys[rows.to(layer.device), :, : source.capacity] = source.keys
            layer.values[rows.to(layer.device), :, : source.capacity] = source.values

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that are allocated."""
        held = [states for layer in self.layers if layer.is_initialized for states in (layer.keys, layer.values)]
        return sum(states.numel() * states.element_size() for states in held)

    @repeated
    def rows(self, start: int, stop: int) -> TreeCache:
        """Rows start .. stop - 1 as a cache of their own; both share their keys and values. Everything must be allocated."""
        part = TreeCache(len(self.layers), self.capacity, self.ranks)
        part.layers = [layer.rows(start, stop) for layer in self.layers]
        for layer in part.layers:
            layer.cursor = part.cursor
        return part

    def take(self, layers: list[TreeCacheLayer]) -> None:
        """Take over the layers of a cache that is used no more; what they hold is written over."""
        self.layers = layers
        for layer in layers:
            layer.cursor = self.cursor

    @repeated
    def swap(self, row: int, other: int, slots: int) -> None:
        """Let two rows change places, as far as the first `slots` slots."""
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            for states in (layer.keys, layer.values):
                held = states[row, :, :slots].clone()
                states[row, :, :slots] = states[other, :, :slots]
                states[other, :, :slots] = held

    @repeated
    def grow(self, capacity: int) -> None:
        """Extend every row to `capacity` slots; the contents stay."""
        self.capacity = capacity
        for layer in self.layers:
            layer.grow(capacity)
