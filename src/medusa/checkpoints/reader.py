"""Reading: heads from any format, recognised by their tensor names, with every tensor accounted for."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa.checkpoints.names import ONE_LM_HEAD, TOKEN_MAP, TOKEN_MAPS, WANTED, Part, belongs_to_heads, in_style, ours, parse
from medusa.checkpoints.tensors import read_tensors, tensor_names
from medusa.config import CONFIG_FILE, HEADS_FILE, HEADS_FILES, MODEL_FILES, OLD_HEADS_FILE, MedusaConfig, read_json_object
from medusa.errors import CheckpointError
from medusa.heads import MedusaHeads

HEADS_KEYS = ("medusa_num_heads", "num_medusa_heads")
LAYERS_KEYS = ("medusa_num_layers", "num_medusa_layers")


@dataclass(frozen=True)
class Checkpoint:
    """Heads as found in a file: memory-mapped tensors under our names, their sizes, and anything unusual about them."""

    source: Path
    format: str  # medusa (ours), v0.1, v2, vllm, merged or modelopt
    tensors: dict[str, Tensor]
    config: MedusaConfig
    vocab_size: int | None  # None if the LM head is shared and no config gives it
    tied_blocks: bool  # the blocks of each head are equal: the old `[block] * L`
    notes: tuple[str, ...]  # disagreements of config and file, and assumptions made

    @property
    def num_heads(self) -> int:
        return self.config.medusa_num_heads

    def heads(self, dtype: torch.dtype | None = None, vocab_size: int | None = None) -> MedusaHeads:
        """Build the heads around the tensors, without copying them, in a dtype (default: their own); `vocab_size` is the
        backbone's, for heads that share its LM head and do not state it. CheckpointError if it is unknown."""
        vocab_size = self.vocab_size or vocab_size
        if vocab_size is None:
            raise CheckpointError(
                f"{self.source} shares the backbone's LM head and has no {CONFIG_FILE} that gives vocab_size; name the backbone"
            )
        # Of several dtypes, the one that can represent all: nothing is rounded.
        floats = [tensor.dtype for name, tensor in self.tensors.items() if name != TOKEN_MAP]
        dtype = dtype or functools.reduce(torch.promote_types, floats)
        held = {name: tensor.to(torch.long if name == TOKEN_MAP else dtype) for name, tensor in self.tensors.items()}
        return MedusaHeads.around(dataclasses.replace(self.config, vocab_size=vocab_size), held)


def has_heads(folder: Path) -> bool:
    """Whether a folder contains heads of any format; only tensor names are read."""
    return any((folder / name).is_file() for name in HEADS_FILES) or _model_file(folder) is not None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find and memory-map the heads of any format in a folder or file; CheckpointError if there are none that can be read."""
    path = Path(path)
    if path.is_file():
        file, folder = path, path.parent
    else:
        folder = path
        found = next((folder / name for name in HEADS_FILES if (folder / name).is_file()), None) or _model_file(folder)
        if found is None:
            raise CheckpointError(
                f"no Medusa heads in {folder}: expected {HEADS_FILE}, {OLD_HEADS_FILE}, or a model's files with tensors named "
                f"like {WANTED}; pass heads=FOLDER or train some"
            )
        file = found
    # In a whole model's files, only the heads' tensors are checked.
    inside = any(map(belongs_to_heads, tensor_names(file)))
    tensors = read_tensors(file, belongs_to_heads if inside else lambda name: True)
    # Often the backbone's own config, if the heads are in its folder: used only for what the tensors do not determine.
    config = read_json_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    return checkpoint_of(tensors, config, file)


def load_heads(folder: str | Path, dtype: torch.dtype | None = None, backbone: str | Path | None = None) -> MedusaHeads:
    """Load heads from a folder or file of any format; CheckpointError if there are none that can be read.

    The tensors determine the numbers of heads and layers, and, if it is not given, the dtype. The config of the backbone's
    folder gives the vocabulary size if the heads' own does not.
    """
    checkpoint = open_checkpoint(folder)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    vocab_size = None
    if checkpoint.vocab_size is None and backbone is not None and (Path(backbone) / CONFIG_FILE).is_file():
        vocab_size = _vocab_size(read_json_object(Path(backbone) / CONFIG_FILE))
    return checkpoint.heads(dtype, vocab_size)


def checkpoint_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: Path) -> Checkpoint:
    """The heads that named tensors form, CheckpointError if they form none; the config gives only what tensors do not
    determine."""
    tensors = dict(tensors)
    token_map = _token_map(tensors, source)
    parts = _parsed(tensors, source)
    style = next(iter(parts.values())).style
    num_heads, num_layers = _sizes(parts, source)
    held = {ours(part, num_layers): tensors[name] for name, part in parts.items()}
    if ONE_LM_HEAD in tensors:
        held |= {f"{k}.{num_layers}.weight": tensors[ONE_LM_HEAD] for k in range(num_heads)}
    own = any(part.layer is None for part in parts.values()) or ONE_LM_HEAD in tensors
    notes = _fill(held, parts, num_layers)
    first = f"0.{num_layers}.weight" if own else "0.0.linear.weight"
    if first not in held or held[first].ndim != 2:
        raise CheckpointError(f"{source} has no matrix {in_style(first, style)}")
    rows, hidden_size = held[first].shape
    if own and token_map is not None and int(token_map[-1]) + 1 == len(token_map) == rows:
        token_map = None  # it lists all tokens
    vocab_size = rows if own and token_map is None else _vocab_size(config)
    draft = None
    if token_map is not None and len(token_map) < _check_vocabulary(token_map, vocab_size, source):
        held[TOKEN_MAP], draft = token_map, len(token_map)
    bias = any(part.layer is None and part.kind == "bias" for part in parts.values())
    base_model = config.get("base_model_name_or_path")
    reads = _reads(held, num_heads, config, source)
    reads["base_model_name_or_path"] = base_model if isinstance(base_model, str) else None
    own_config = MedusaConfig(hidden_size, vocab_size or rows, num_heads, num_layers, not own, bias, draft, **reads)
    _check_shapes(held, own_config, style, source)
    for what, keys, count in (("heads", HEADS_KEYS, num_heads), ("layers", LAYERS_KEYS, num_layers)):
        said = next((config[key] for key in keys if isinstance(config.get(key), int)), count)
        if said != count:
            notes.append(f"{CONFIG_FILE} says {said} {what}, {source} holds {count}; the latter is used")
    if not own and config.get("medusa_shared_lm_head") is False:
        notes.append(f"{CONFIG_FILE} says the heads have LM heads of their own, {source} holds none; the backbone's is used")
    kind = _format(style, source, own_config)
    tied = num_layers > 1 and _tied(held, num_heads, num_layers)
    return Checkpoint(source, kind, held, own_config, vocab_size, tied, tuple(notes))


def _check_vocabulary(token_map: Tensor, vocab_size: int | None, source: Path) -> int:
    """The size of the vocabulary, which must contain the tokens that heads score."""
    if vocab_size is None:
        raise CheckpointError(f"{source} has a draft vocabulary and no {CONFIG_FILE} that gives vocab_size; copy it as well")
    if not 0 <= int(token_map[0]) <= int(token_map[-1]) < vocab_size:
        raise CheckpointError(f"{source}: {TOKEN_MAP} names tokens outside the vocabulary of {vocab_size}")
    return vocab_size


def _check_shapes(held: dict[str, Tensor], config: MedusaConfig, style: str, source: Path) -> None:
    """Raise CheckpointError unless these are exactly the tensors of such heads."""
    with torch.device("meta"):
        wanted = MedusaHeads.of(config).state_dict()
    size = f"{config.medusa_num_heads} heads of {config.medusa_num_layers} layers"
    for name in sorted(wanted.keys() | held.keys()):
        if name not in held:
            raise CheckpointError(f"{source} lacks tensor {in_style(name, style)}, expected for {size}; copy it again")
        got, want = tuple(held[name].shape), tuple(wanted[name].shape) if name in wanted else "none"
        if got != want:
            raise CheckpointError(f"{source}: tensor {in_style(name, style)} has shape {got}, expected {want} ({size})")


def _token_map(tensors: dict[str, Tensor], source: Path) -> Tensor | None:
    """Remove the ascending list of token ids that heads score from the tensors and return it, if there is one."""
    name = next((name for name in tensors if name in TOKEN_MAPS), None)
    if name is None:
        return None
    found = tensors.pop(name).long()
    if found.ndim != 1 or len(found) == 0 or not bool((found.diff() > 0).all()):
        raise CheckpointError(f"{source}: {name} is not a list of ascending token ids")
    return found


def _parsed(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Part]:
    """Parse every tensor name; all names must belong to one format."""
    parts: dict[str, Part] = {}
    for name in tensors:
        part = parse(name)
        if name.endswith("_scale"):
            raise CheckpointError(f"{source} holds {name}: quantised heads; expected floats of 16 or more bits")
        if part is not None:
            parts[name] = part
        elif name != ONE_LM_HEAD:
            raise CheckpointError(f"{source} holds {name}; expected names like {WANTED}")
    styles = {part.style: name for name, part in parts.items()}
    if not parts:
        raise CheckpointError(f"{source} holds no tensors of heads; expected names like {WANTED}")
    if len(styles) > 1 or (ONE_LM_HEAD in tensors and "vllm" not in styles):
        names = [*styles.values(), ONE_LM_HEAD][:2]
        raise CheckpointError(f"{source} holds {names[0]} and {names[1]}, which are names of two formats; expected one")
    return parts


def _sizes(parts: dict[str, Part], source: Path) -> tuple[int, int]:
    """The number of heads, and of residual blocks per head, according to the names."""
    num_heads = 1 + max(part.head for part in parts.values())
    num_layers = max(part.place or 0 if part.layer is None else part.layer + 1 for part in parts.values())
    if max(num_heads, num_layers) > len(parts):
        raise CheckpointError(f"{source} has {len(parts)} tensors and names for {num_heads} heads of {num_layers} layers")
    for name, part in parts.items():
        if part.place not in (None, num_layers):
            raise CheckpointError(f"{source}: {name} stands where a block would; expected LM heads behind {num_layers} blocks")
    return num_heads, num_layers


def _reads(held: dict[str, Tensor], num_heads: int, config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The configuration of heads that read tokens, by the shapes of what reads them; empty for heads that read none."""
    first, last = held.get("0.0.tokens.weight"), held.get(f"{num_heads - 1}.0.tokens.weight")
    if first is None:
        return {}
    scale = config.get("medusa_embedding_scale")
    if not isinstance(scale, int | float):
        raise CheckpointError(
            f"{source} holds heads that read tokens and no {CONFIG_FILE} that gives medusa_embedding_scale; copy it as well"
        )
    more = last is not None and last.shape[-1] > first.shape[-1]
    kind = config.get("medusa_heads_kind") if num_heads == 1 else None  # of one head nothing else tells them apart
    return {
        "medusa_heads_kind": kind if kind in ("root", "path") else "path" if more else "root",
        "medusa_embedding_size": first.shape[-1],
        "medusa_embedding_scale": float(scale),
    }


def _fill(held: dict[str, Tensor], parts: dict[str, Part], num_layers: int) -> list[str]:
    """Add tensors that a file may omit: repetitions of tied blocks, and zero biases. Returns notes on assumptions made."""
    notes = []
    blocks = {part.layer for part in parts.values() if part.layer is not None}
    if len(blocks) == 1 and any(part.place == num_layers > 1 for part in parts.values()):
        # safetensors stores a tensor shared by several names only once.
        notes.append(
            f"one block per head in the file, and LM heads behind {num_layers}: taken as the same one {num_layers} times"
        )
        for part in parts.values():
            if part.layer is not None:
                copies = (dataclasses.replace(part, layer=layer) for layer in range(num_layers))
                held |= {ours(copy, num_layers): held[ours(part, num_layers)] for copy in copies}
    if blocks and not any(part.layer is not None and part.kind == "bias" for part in parts.values()):
        for name, tensor in list(held.items()):
            if ".linear." in name and tensor.ndim:
                held[name.replace("weight", "bias")] = tensor.new_zeros(tensor.shape[0])
    return notes


def _tied(held: dict[str, Tensor], num_heads: int, num_layers: int) -> bool:
    """Whether the blocks of each head are equal, as `[block] * L` made them."""
    return all(
        torch.equal(held[f"{k}.0.linear.{kind}"], held[f"{k}.{layer}.linear.{kind}"])
        for k in range(num_heads)
        for layer in range(1, num_layers)
        for kind in ("weight", "bias")
    )


def _format(style: str, source: Path, config: MedusaConfig) -> str:
    """Ours has the names of v0.1 in safetensors; with one block and no LM head it is v2."""
    if style != "v0.1" or source.suffix != ".safetensors":
        return style
    is_v2 = config.medusa_shared_lm_head and config.medusa_heads_kind == "medusa" and config.medusa_num_layers == 1
    return "v2" if is_v2 else "medusa"


def _model_file(folder: Path) -> Path | None:
    """The model file, or the index of its shards, if it contains heads."""
    path = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    return path if path is not None and any(parse(name) for name in tensor_names(path)) else None


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) and size > 0 else None
