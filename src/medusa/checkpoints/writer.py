"""Writing: heads in the formats that engines read, atomically, and read back before they count as written."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medusa.checkpoints.names import ONE_LM_HEAD, TOKEN_MAP, belongs_to_heads, in_style
from medusa.checkpoints.reader import open_checkpoint
from medusa.checkpoints.tensors import tensor_names, tensor_sizes
from medusa.config import CONFIG_FILE, HEADS_FILE, INDEX, OLD_HEADS_FILE, SAFETENSORS, TREE_FILE, read_json_object
from medusa.errors import CheckpointError, InvalidInput, one_line
from medusa.heads import MedusaHeads
from medusa.placement import linear_map
from medusa.runs.files import whole, write_json

FORMATS = ("medusa", "v0.1", "v2", "vllm", "merged")
# Files of a backbone's folder that a merged model gets besides the weights.
BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
NOT_BESIDE = ("*" + INDEX, TREE_FILE, "adapter_config.json", "training.json", "run.json", "__init__.py")


def save_heads(heads: MedusaHeads, folder: str | Path, base_model: str | None = None, config: bool = True) -> None:
    """Write `medusa_lm_head.safetensors` and, unless the folder has the backbone's, its `config.json`, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save(heads.state_dict(), folder / HEADS_FILE)
    if config:
        dataclasses.replace(heads.config, base_model_name_or_path=base_model).save(folder)


def write_checkpoint(
    heads: MedusaHeads,
    output: str | Path,
    to: str,
    base_model: str | None = None,
    lm_head: nn.Module | None = None,
    backbone: Path | None = None,
    beside: Sequence[Path] = (),
) -> None:
    """Write heads as a new folder in one of `FORMATS` and read them back; the folder appears only when it is complete.

    Args:
        base_model: name under which engines find the backbone.
        lm_head: the backbone's LM head, needed if the heads share it but not the format, or the other way round.
        backbone: folder of the backbone with safetensors, for a merged model.
        beside: files to copy into the folder.

    Raises:
        InvalidInput: the format is unknown, the folder exists, or something that the format needs was not given.
        CheckpointError: the format cannot store these heads, or they differ after being read back.
    """
    output = Path(output).absolute()
    check_request(output, to)
    heads = _fit(heads, to, lm_head)
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole(output) as folder:
        folder.mkdir()
        for file in beside:
            shutil.copyfile(file, folder / file.name)
        if to == "v0.1":
            try:
                torch.save(_on_cpu(heads.state_dict()), folder / OLD_HEADS_FILE)
            except RuntimeError as error:  # torch's error for a full disk
                raise CheckpointError(f"cannot write {folder / OLD_HEADS_FILE}: {one_line(error)}") from None
            dataclasses.replace(heads.config, base_model_name_or_path=base_model).save(folder)
        elif to == "vllm":
            _write_vllm(heads, folder, base_model, lm_head)
        elif to == "merged":
            if backbone is None:
                raise InvalidInput("a merged model holds its backbone; name it with --backbone")
            _write_merged(heads, folder, backbone)
        else:
            save_heads(heads, folder, base_model)
        _check(heads, folder, lm_head)


def check_request(output: Path, to: str) -> None:
    """Refuse an unknown format, and an output folder that is not empty."""
    if to not in FORMATS:
        raise InvalidInput(f"format is {to!r}, expected one of {', '.join(FORMATS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidInput(f"{output} exists; give the name of a new folder")


def wants_lm_head(shared: bool, to: str) -> bool:
    """Whether writing these heads in a format needs the backbone's LM head."""
    return (shared and to in ("v0.1", "vllm")) or (not shared and to == "v2")


def _fit(heads: MedusaHeads, to: str, lm_head: nn.Module | None) -> MedusaHeads:
    """The heads in the shape that the format requires: v0.1 with their own LM heads, v2 with the backbone's."""
    if heads.kind != "medusa" and to in ("v0.1", "v2", "vllm"):
        raise CheckpointError(
            f"{to} has heads that read the hidden state alone, these read the {heads.kind}; write medusa or merged"
        )
    if to == "v2" and heads.num_layers != 1:
        raise CheckpointError(f"v2 has one residual block per head, these have {heads.num_layers}; write another format")
    if heads.config.medusa_draft_vocabulary is not None and to in ("v0.1", "v2", "vllm"):
        if not heads.config.medusa_shared_lm_head:
            raise CheckpointError(
                f"{to} has no draft vocabulary, and these heads have LM heads of {heads.scored} tokens; write medusa or merged"
            )
        held = {name: tensor for name, tensor in heads.state_dict().items() if name != TOKEN_MAP}
        heads = MedusaHeads.around(dataclasses.replace(heads.config, medusa_draft_vocabulary=None), held)  # they score all
    if not wants_lm_head(heads.config.medusa_shared_lm_head, to):
        if to in ("v0.1", "vllm") and heads.config.medusa_lm_head_bias:
            raise CheckpointError(f"{to} has no bias on LM heads, these have one; write medusa or merged")
        return heads
    if lm_head is None:
        raise InvalidInput(f"{to} needs the backbone's LM head for these heads; name the backbone with --backbone")
    theirs = _parameters(lm_head, heads)
    if to != "v2" and "bias" in theirs:
        raise CheckpointError(f"{to} has no bias on LM heads, the backbone's has one; write medusa or merged")
    if to == "vllm":
        return heads  # vLLM's format stores the one LM head separately
    held = _on_cpu(heads.state_dict())
    for k in range(len(heads)):
        place = f"{k}.{heads.num_layers}."
        if to == "v0.1":
            held |= {place + name: tensor for name, tensor in theirs.items()}
            continue
        own = {name.removeprefix(place): held.pop(name) for name in list(held) if name.startswith(place)}
        if own.keys() != theirs.keys() or not all(torch.equal(own[name], theirs[name]) for name in own):
            raise CheckpointError(f"v2 heads predict through the backbone's LM head; head {k + 1} has another; write v0.1")
    return MedusaHeads.around(dataclasses.replace(heads.config, medusa_shared_lm_head=to == "v2"), held)


def _write_vllm(heads: MedusaHeads, folder: Path, base_model: str | None, lm_head: nn.Module | None) -> None:
    """Write vLLM's tensor names, and the keys that its MedusaConfig requires (0.9.2 to 0.32)."""
    config = heads.config
    tensors = {in_style(name, "vllm"): tensor for name, tensor in heads.state_dict().items()}
    if config.medusa_shared_lm_head:
        assert lm_head is not None
        tensors[ONE_LM_HEAD] = _parameters(lm_head, heads)["weight"]
    _save(tensors, folder / SAFETENSORS)
    found = {
        "model_type": "medusa",
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_heads": len(heads),
        "num_hidden_layers": heads.num_layers,
        "medusa_fc_bias": True,  # otherwise biases are silently ignored
        "original_lm_head": config.medusa_shared_lm_head,
        "base_model_name_or_path": base_model,
    }
    write_json(folder / CONFIG_FILE, found)


def copy_beside(backbone: Path, folder: Path) -> None:
    """Copy a backbone's files except weights and anything of heads: configurations, tokenizer, code."""
    for path in backbone.iterdir():
        wanted = any(fnmatch(path.name, pattern) for pattern in BESIDE_WEIGHTS)
        if wanted and path.is_file() and not any(fnmatch(path.name, other) for other in NOT_BESIDE):
            shutil.copyfile(path, folder / path.name)


def _write_merged(heads: MedusaHeads, folder: Path, backbone: Path) -> None:
    """Write a whole model: the backbone's files unchanged, the heads as one more shard, and a joint index and config."""
    index = backbone / (SAFETENSORS + INDEX)
    if (backbone / SAFETENSORS).is_file():
        files = [backbone / SAFETENSORS]
    elif index.is_file():
        files = [backbone / name for name in sorted(set(read_json_object(index)["weight_map"].values()))]
    else:
        raise CheckpointError(f"no {SAFETENSORS} in {backbone}, in one file or in shards; save the backbone as safetensors")
    copy_beside(backbone, folder)
    weight_map: dict[str, str] = {}
    size = 0
    for number, file in enumerate([*files, None], 1):
        name = f"model-{number:05}-of-{len(files) + 1:05}.safetensors"
        if file is None:
            _save({in_style(ours, "merged"): tensor for ours, tensor in heads.state_dict().items()}, folder / name)
        elif any(map(belongs_to_heads, tensor_names(file))):  # heads that these replace
            _save({own: t for own, t in load_file(file).items() if not belongs_to_heads(own)}, folder / name)
        else:
            shutil.copyfile(file, folder / name)
        sizes = tensor_sizes(folder / name)
        weight_map |= dict.fromkeys(sizes, name)
        size += sum(sizes.values())
    found = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / (SAFETENSORS + INDEX), found)
    ours_too = {key: value for key, value in heads.config.to_dict().items() if key.startswith("medusa_")}
    config = {**read_json_object(backbone / CONFIG_FILE), **ours_too}
    write_json(folder / CONFIG_FILE, config, sort_keys=True)


def _check(heads: MedusaHeads, folder: Path, lm_head: nn.Module | None) -> None:
    """Read the heads back: every tensor must be bit-identical."""
    found, wanted = open_checkpoint(folder), _on_cpu(heads.state_dict())
    copied = heads.config.medusa_shared_lm_head and not found.config.medusa_shared_lm_head
    if lm_head is not None and copied:  # as vLLM's format has it
        wanted |= {f"{k}.{heads.num_layers}.weight": _parameters(lm_head, heads)["weight"] for k in range(len(heads))}
    assert found.notes == () and found.tensors.keys() == wanted.keys(), found.notes
    for name, tensor in wanted.items():
        if not torch.equal(tensor.view(torch.uint8), found.tensors[name].view(torch.uint8)):
            raise CheckpointError(f"{folder}: {name} differs when read back from what was written; check the disk")


def _parameters(lm_head: nn.Module, heads: MedusaHeads) -> dict[str, Tensor]:
    """The weight, and bias if any, of the backbone's LM head, in the heads' dtype."""
    found = dict(zip(("weight", "bias"), linear_map(lm_head), strict=True))
    return {name: tensor.to("cpu", heads.dtype) for name, tensor in found.items() if tensor is not None}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors; tensors that share memory are copied first, since the format cannot store shared tensors."""
    seen: set[int] = set()
    own = {}
    for name, tensor in _on_cpu(tensors).items():
        own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    with whole(path) as partial:
        try:
            save_file(own, partial, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"cannot write {path}: {one_line(error)}") from None
