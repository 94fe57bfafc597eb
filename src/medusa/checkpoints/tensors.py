"""Tensor files: safetensors and pickles, in one file or in shards, memory-mapped, without executing code."""

from __future__ import annotations

import json
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medusa.checkpoints.names import TOKEN_MAPS
from medusa.config import INDEX, read_json_object
from medusa.errors import CheckpointError, InvalidInput, one_line
from medusa.runs.files import whole

_INTEGERS = {"I32": torch.int32, "I64": torch.int64}  # for token ids
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a file or an index of shards; CheckpointError if it is broken, or a pickle that contains
    code."""
    if path.name.endswith(INDEX):
        return list(_weight_map(path))
    return list(tensor_sizes(path) if path.suffix == ".safetensors" else _unpickled(path))


def check_tensors(path: Path) -> None:
    """Check a file, or an index and all its shards; CheckpointError if one is broken or missing, or a pickle that contains
    code."""
    if not path.name.endswith(INDEX):
        tensor_names(path)
        return
    for shard in sorted(set(_weight_map(path).values())):
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path} names the shard {shard}, which is not there; copy it again")
        tensor_names(path.parent / shard)


def tensor_sizes(path: Path) -> dict[str, int]:
    """The size in bytes of each tensor in a safetensors file; CheckpointError if the file is broken."""
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in _header(path)[0].items()}


def read_tensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors of a file, or of an index of shards, memory-mapped, so that pages are read when used; CheckpointError
    if a file is broken, something is missing, a tensor is not of floats, or a pickle contains code."""
    if not path.name.endswith(INDEX):
        return _mapped(path, wanted) if path.suffix == ".safetensors" else _pickled(path, wanted)
    shards: dict[str, list[str]] = {}
    for name, shard in _weight_map(path).items():
        if wanted(name):
            shards.setdefault(shard, []).append(name)
    found: dict[str, Tensor] = {}
    for shard, names in shards.items():
        file = path.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{path} names the shard {shard}, which is not there; copy it again")
        tensors = read_tensors(file, set(names).__contains__)
        for name in names:
            if name not in tensors:
                raise CheckpointError(f"{path} says that {name} is in {shard}, and it is not; copy both again")
        found |= tensors
    return found


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors that no two names share; the file is complete or absent. InvalidInput if it cannot be written."""
    try:
        with whole(path) as partial:
            save_file(tensors, partial)
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"cannot write {path}: {one_line(error)}; make room and run the same command again") from None


def _weight_map(path: Path) -> dict[str, str]:
    found = read_json_object(path).get("weight_map")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not an index of shards: it has no weight_map")
    for name, shard in found.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard.endswith(INDEX):
            raise CheckpointError(f"{path}: {name} is in {shard!r}, expected a file of the same folder")
    return found


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header of a safetensors file, checked by safetensors itself, and the offset at which the tensors begin."""
    try:
        with safe_open(path, "np"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is broken or truncated ({one_line(error)}); copy it again") from None
    header.pop("__metadata__", None)
    return header, 8 + length


def _mapped(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    # Each tensor is mapped separately: torch would map the whole file, which fails if it is larger than memory.
    header, base = _header(path)
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file:
        for name in filter(wanted, header):
            start, end = header[name]["data_offsets"]
            dtype = (_DTYPES | _INTEGERS if name in TOKEN_MAPS else _DTYPES).get(header[name]["dtype"])
            if dtype is None:
                kind = header[name]["dtype"]
                raise CheckpointError(f"{path}: tensor {name} is {kind}, expected unquantised floats of 16 or more bits")
            skipped = (base + start) % mmap.ALLOCATIONGRANULARITY
            if start == end:
                tensors[name] = torch.empty(header[name]["shape"], dtype=dtype)
                continue
            pages = mmap.mmap(file.fileno(), end - start + skipped, access=mmap.ACCESS_COPY, offset=base + start - skipped)
            flat = torch.frombuffer(pages, dtype=torch.uint8, offset=skipped)
            # Copied if a narrower tensor before it leaves it unaligned.
            flat = flat.clone() if skipped % dtype.itemsize else flat
            tensors[name] = flat.view(dtype).view(header[name]["shape"])
    return tensors


def _pickled(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in _unpickled(path).items() if wanted(name)}
    for name, tensor in tensors.items():
        floats = {*_DTYPES.values(), *(_INTEGERS.values() if name in TOKEN_MAPS else ())}
        if not isinstance(tensor, Tensor) or tensor.dtype not in floats:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise CheckpointError(f"{path}: {name!r} is {kind}, expected named tensors of floats of 16 or more bits")
    return tensors


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds code, {code[1]}," if code else "is broken or holds code"
        raise CheckpointError(f"{path} {what} and was not loaded; ask its author for safetensors") from None
    except Exception as error:  # a broken pickle can raise any error
        raise CheckpointError(f"{path} is broken and was not loaded ({one_line(error, 120)}); copy it again") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected named tensors")
    return found
