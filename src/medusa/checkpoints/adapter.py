"""Adapters: the LoRA that Medusa-2 trains on the backbone (paper 2.2.2, B.2), through peft."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from medusa.backbone.ranks import parts_of
from medusa.checkpoints.quantization import DynamicQuantizer
from medusa.config import CONFIG_FILE, read_json_object
from medusa.errors import CheckpointError, InvalidInput
from medusa.placement import device_of, is_offloaded, is_plain
from medusa.runs.extras import require
from medusa.runs.files import whole

PEFT_PREFIX = "base_model.model."  # peft's wrapper, which its files name and we do not use
ADAPTER_FILES = ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def attach_adapter(backbone: PreTrainedModel, rank: int, alpha: int, dropout: float) -> None:
    """Put a new LoRA on every linear layer of a backbone, including the LM head; untrained, it changes nothing."""
    peft = require("peft", "train", "an adapter")
    if getattr(backbone, "peft_config", None):
        raise InvalidInput("the backbone already has an adapter; merge it first (peft: merge_and_unload)")
    linear = (nn.Linear, Conv1D)  # bitsandbytes' quantised layers are of the first kind, GPT-2's of the second
    targets = [name for name, module in backbone.named_modules() if isinstance(module, linear)]
    _untie(backbone)
    backbone.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets))
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:  # in bfloat16 small updates would round to nothing
            parameter.data = parameter.data.float()


def has_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def adapted_model(folder: Path) -> str | None:
    """The name of the model that an adapter was made for, if a folder holds an adapter instead of a model; None otherwise.
    CheckpointError if the adapter does not name it."""
    if not has_adapter(folder) or (folder / CONFIG_FILE).is_file():
        return None
    name = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not name its model (base_model_name_or_path)")
    return name


def load_adapter(backbone: PreTrainedModel, folder: Path) -> None:
    """Load an adapter into a backbone and merge it into the weights, so that it costs nothing when decoding; a quantised or
    offloaded backbone keeps it separate. CheckpointError if it is broken, or made for another model."""
    peft = require("peft", "train", "an adapter")
    if parts_of(backbone) > 1:
        raise CheckpointError(
            f"the adapter in {folder} cannot be merged into a tensor-parallel model; merge it first: "
            "medusa convert HEADS OUT --to merged"
        )
    if isinstance(getattr(backbone, "hf_quantizer", None), DynamicQuantizer):
        raise CheckpointError(
            f"the adapter in {folder} cannot be used: no adapter can be added to weights that are quantised; give the original "
            "backbone with --quantization, which merges the adapter first"
        )
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        tensors = peft.utils.load_peft_weights(str(folder), device="cpu")
        tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        ends = backbone.get_input_embeddings(), backbone.get_output_embeddings()  # which may share a matrix
        names = tuple(f"{name}." for name, module in backbone.named_modules() if module in ends)
        if any(name.startswith(names) for name in tensors):
            _untie(backbone)
        peft.inject_adapter_in_model(config, backbone)
        if is_offloaded(backbone):
            _bring_adapter(backbone)
        result = peft.set_peft_model_state_dict(backbone, tensors)
    except Exception as error:  # peft and safetensors raise errors of many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"the adapter in {folder} is broken or for another model ({reason})") from None
    unread = list(result.unexpected_keys) + [name for name in result.missing_keys if ".lora_" in name]
    if unread:
        raise CheckpointError(f"the adapter in {folder} is for another model: {unread[0]} has no counterpart")
    if getattr(backbone, "hf_quantizer", None) is None and not is_offloaded(backbone):
        _merge(backbone)


def save_adapter(backbone: PreTrainedModel, folder: Path, base_model: str | None, trained: dict[str, Tensor]) -> None:
    """Write the backbone's adapter as peft's two files, from tensors named as in the backbone (`trained`)."""
    peft = require("peft", "train", "an adapter")
    (name, config) = next(iter(backbone.peft_config.items()))
    # Without the embedding and the LM head themselves, which peft would add if an adapter is on the LM head.
    tensors = peft.get_peft_model_state_dict(backbone, trained, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach().to("cpu", backbone.dtype).contiguous() for key, tensor in tensors.items()}
    with whole(folder / ADAPTER_WEIGHTS) as partial:
        save_file(tensors, partial)
    saved = copy.copy(config)
    saved.base_model_name_or_path, saved.inference_mode = base_model, True
    saved.save_pretrained(str(folder))


def plain_lora(layer: Any) -> tuple[nn.Linear, Callable[[Tensor], Tensor], Tensor] | None:
    """The parts of a linear layer with one plain LoRA that is switched on: the layer y = base(x) + inner(x) outer^T; None for
    any other module.

    Returns:
        base, a dense matrix of V rows; inner, which makes r features of x; outer (V, r).
    """
    if not hasattr(layer, "lora_A"):
        return None
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or layer.disable_adapters or layer.merged or not is_plain(base := layer.base_layer):
        return None
    (name, *others), parts = layer.active_adapters, dict(layer.named_modules())
    down, up = parts.get(f"lora_A.{name}"), parts.get(f"lora_B.{name}")
    if others or layer.lora_variant or not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)) or up.bias is not None:
        return None
    dropout, scale = parts[f"lora_dropout.{name}"], layer.scaling[name]
    return base, lambda x: scale * down(dropout(x.to(down.weight.dtype))), up.weight


@contextmanager
def without_adapter(backbone: PreTrainedModel) -> Iterator[None]:
    """Switch the adapter off within the context: the original model (paper 2.3.2: a teacher that takes no memory)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
    # Set directly: peft's own switch also toggles requires_grad of the adapter, and is just as private.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _merge(backbone: PreTrainedModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(backbone.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # around a fully trained module
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif isinstance(module, BaseTunerLayer):
            module.merge()
            merged = module.get_base_layer()
        else:
            continue
        backbone.set_submodule(name, merged)


def _bring_adapter(backbone: PreTrainedModel) -> None:
    """Allocate an adapter's tensors where its layers compute; peft leaves them on meta."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in backbone.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise InvalidInput(f"it holds {name} itself, which an offloaded backbone cannot take; load the backbone whole")
        if isinstance(module, BaseTunerLayer):
            for part in module.adapter_layer_names:
                if (layer := getattr(module, part, None)) is not None and is_offloaded(layer):
                    layer.to_empty(device=device_of(module.get_base_layer()))


def _untie(backbone: PreTrainedModel) -> None:
    """Give an LM head that shares the embedding's matrix its own copy: an adapter on one must not change the other."""
    lm_head: Any = backbone.get_output_embeddings()
    if backbone.config.get_text_config(decoder=True).tie_word_embeddings and is_offloaded(lm_head):
        raise InvalidInput(
            "an adapter is on the LM head or the embedding, which share a matrix that is offloaded; load it whole"
        )
    shared = {id(parameter) for parameter in backbone.get_input_embeddings().parameters()}
    for module in lm_head.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in shared:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    backbone.config.get_text_config(decoder=True).tie_word_embeddings = False
    backbone.config.tie_word_embeddings = False
