"""Ranks: the processes that each hold a part of one model. Rank 0 decodes; the others repeat its calls of the model.

Weights are sharded by transformers (`DistributedConfig`), and all ranks compute a pass together. All else (drafts, draws,
processors, acceptance, scheduling) is decided by rank 0 alone: ranks that decided for themselves could differ by a
rounding, and would then wait for each other for ever.
"""

from __future__ import annotations

import io
import pickle
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from medusa.errors import InvalidInput, MedusaError, RankLost, UnsupportedBackbone, one_line
from medusa.placement import device_of

T = TypeVar("T")

IDLE = timedelta(days=365)  # how long ranks wait for rank 0: a server may have no requests for long
ALIGNED = 8  # bytes: tensors are sent in one buffer, each at a multiple of its element size


class Ranks:
    """The ranks of a tensor-parallel model, seen from one of them.

    All ranks run the same program and call the model together, as transformers' models are used. While rank 0 is `leading`, it
    alone decodes: it announces its calls of `repeated` methods, and the others, which `follow`, make them too.

    Args:
        device: the device of this rank's part.
    """

    def __init__(self, device: torch.device):
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.leading = False
        self._group = dist.new_group(backend="gloo", timeout=IDLE)  # for what the host has to know
        self._lock = threading.RLock()  # on rank 0: a call and its announcement belong together
        self._inside = False  # a call that was announced is being made: calls within it are part of it
        self._next = 0  # number of the next thing that methods are called on
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # of rank 0's things
        self._gone: deque[int] = deque()  # numbers of those that rank 0 no longer has
        self._things: dict[int, Any] = {}  # of the other ranks

    # On all ranks.

    def enter(self, thing: T) -> T:
        """Number a thing that methods are called on; all ranks enter their things in the same order."""
        number, self._next = self._next, self._next + 1
        if self.rank == 0:
            self._numbers[thing] = number
            weakref.finalize(thing, self._gone.append, number)
        else:
            self._things[number] = thing
        return thing

    def repeat(self, module: nn.Module) -> None:
        """Make a module's forward pass one of the calls that are repeated."""
        self.enter(module)
        forward = module.forward
        module.forward = lambda *args: self.call(module, "forward", forward, args)

    def shared(self, steps: Iterator[T]) -> Iterator[T]:
        """The steps that rank 0 takes, on every rank; if rank 0 leads alone, they are its own."""
        if self.leading:
            return steps
        return self._taken(steps) if self.rank == 0 else self._told()

    # On rank 0.

    @contextmanager
    def lead(self) -> Iterator[None]:
        """Go on alone: the others follow."""
        self.leading = True
        try:
            yield
        finally:
            self.leading = False

    def tell(self, what: Any) -> None:
        """End the others' `follow`, which returns this."""
        with self._lock, self._noticing():
            self._send(None, "", (what,))

    def call(self, thing: Any, name: str, function: Callable[..., Any], args: tuple) -> Any:
        """Call a function, which on the other ranks is the method `name` of the same thing."""
        with self._lock:
            if not self.leading or self._inside:
                return function(*args)
            self._inside = True
            try:
                with self._noticing(), _uninterrupted():
                    self._send(self._numbers[thing], name, args)
                    return self._made(function(*args))
            finally:
                self._inside = False

    def _taken(self, steps: Iterator[T]) -> Iterator[T]:
        last = None
        try:
            while True:
                with self.lead():
                    step = next(steps, None)
                if step is None:
                    return
                self.tell(step)
                yield step
        except Exception as error:
            last = MedusaError(f"rank 0 failed: {one_line(error)}")
            raise
        finally:
            self.tell(last)

    # On the other ranks.

    @torch.inference_mode()
    def follow(self) -> Any:
        """Repeat the calls of rank 0 until it tells something; returns that."""
        with self._noticing():
            while True:
                number, name, args = self._receive()
                if number is None:
                    return args[0]
                self._made(getattr(self._things[number], name)(*args))

    def _told(self) -> Iterator[Any]:
        told = None
        try:
            while (told := self.follow()) is not None and not isinstance(told, MedusaError):
                yield told
        except GeneratorExit:  # taken no further, here as on rank 0
            while (told := self.follow()) is not None and not isinstance(told, MedusaError):
                pass
            raise
        if told is not None:
            raise told

    # Both ways.

    def _made(self, result: Any) -> Any:
        """The result of a call; if methods will be called on it, it is entered."""
        return result if result is None or isinstance(result, Tensor) else self.enter(result)

    def _send(self, number: int | None, name: str, args: tuple) -> None:
        packed = _Packing(self._numbers)
        packed.dump(args)
        kinds = [(tensor.dtype, tensor.shape) for tensor in packed.tensors]
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        dist.broadcast_object_list([(number, name, packed.file.getvalue(), kinds, gone)], 0, self._group)
        if kinds:
            dist.broadcast(torch.cat([_bytes(tensor.to(self.device)) for tensor in packed.tensors]), 0)

    def _receive(self) -> tuple[int | None, str, tuple]:
        header: list[Any] = [None]
        dist.broadcast_object_list(header, 0, self._group)
        number, name, packed, kinds, gone = header[0]
        sizes = [_room(dtype, shape) for dtype, shape in kinds]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        if kinds:
            dist.broadcast(buffer, 0)
        parts = zip(kinds, buffer.split(sizes), strict=True)
        tensors = [part[: shape.numel() * dtype.itemsize].view(dtype).view(shape) for (dtype, shape), part in parts]
        args = _Unpacking(packed, tensors, self._things).load()
        for each in gone:
            del self._things[each]
        return number, name, args

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Say in one line that another rank is gone; torch.distributed has several errors for that."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.size} has lost the connection to another, which has probably ended; start all again"
            ) from error


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off to the end of the context: other ranks wait for what has been begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: pressed.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


class _Packing(pickle.Pickler):
    """Pickles arguments of a call without their tensors, and with numbers for the things that all ranks have."""

    def __init__(self, numbers: Mapping[Any, int]):
        self.file = io.BytesIO()
        super().__init__(self.file)
        self.tensors: list[Tensor] = []
        self._numbers = numbers

    def persistent_id(self, thing: Any) -> tuple[str, int] | None:
        if isinstance(thing, Tensor):
            self.tensors.append(thing)
            return "tensor", len(self.tensors) - 1
        return ("thing", self._numbers[thing]) if isinstance(thing, Cache) else None


class _Unpacking(pickle.Unpickler):
    """Reads what `_Packing` has written."""

    def __init__(self, packed: bytes, tensors: Sequence[Tensor], things: Mapping[int, Any]):
        super().__init__(io.BytesIO(packed))
        self._tensors, self._things = tensors, things

    def persistent_load(self, found: tuple[str, int]) -> Any:
        kind, number = found
        return self._tensors[number] if kind == "tensor" else self._things[number]


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, and a few more up to a multiple of the largest element."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return nn.functional.pad(flat, (0, _room(tensor.dtype, tensor.shape) - len(flat)))


def _room(dtype: torch.dtype, shape: torch.Size) -> int:
    """The number of bytes that a tensor takes in a buffer."""
    return -(-shape.numel() * dtype.itemsize // ALIGNED) * ALIGNED


def repeated(method: Callable[..., T]) -> Callable[..., T]:
    """A method of something with `ranks` that all ranks have to make: if rank 0 leads, the others repeat it."""

    @wraps(method)
    def call(self: Any, *args: Any) -> T:
        if self.ranks is None:
            return method(self, *args)
        return self.ranks.call(self, method.__name__, partial(method, self), args)

    return call


def ranks_of(backbone: PreTrainedModel) -> Ranks | None:
    """The ranks among which transformers has shared a model's weights out; None if one process holds all of them.

    Raises:
        UnsupportedBackbone: see `check_shares`.
        InvalidInput: the model is shared among some of the processes only.
    """
    if (size := parts_of(backbone)) == 1:
        return None
    check_shares(backbone.config, size)
    if size != dist.get_world_size():
        raise InvalidInput(f"the model is in {size} parts, {dist.get_world_size()} processes run; start as many as parts")
    return Ranks(device_of(backbone.get_input_embeddings()))


def parts_of(backbone: PreTrainedModel) -> int:
    """The number of processes among which transformers has shared a model's weights out."""
    return getattr(backbone, "_tp_size", None) or 1


def check_shares(config: PreTrainedConfig, size: int) -> None:
    """Raise UnsupportedBackbone if the attention heads of a model cannot be shared out evenly among `size` ranks."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 0)
    groups = getattr(text, "num_key_value_heads", None) or heads
    for number, what in ((groups, "key/value heads"), (heads, "attention heads")):
        if number % size:
            fit = [str(n) for n in range(2, groups + 1) if not (groups % n or heads % n)]
            raise UnsupportedBackbone(
                f"{number} {what} cannot be shared out among {size} ranks; choose {' or '.join(fit) or 'a single process'}"
            )
