"""Quantised backbones: in 4 or 8 bits, through bitsandbytes or with our own kernels on a CPU."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from medusa.config import Quantization
from medusa.errors import InvalidInput
from medusa.kernels.quantized import QuantizedLinear, quantize_maps
from medusa.runs.extras import require

BITS: dict[str, Literal[4, 8]] = {"int4-dynamic": 4, "int8-dynamic": 8}  # of weights that our own kernels read
METHOD = "medusa"  # the name of our kinds in config.json
LAYOUT = 1  # of the tensors of `QuantizedLinear`


def quantized(kind: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for a backbone quantised in this way; InvalidInput if it cannot be.

    nf4 decodes exactly: its weights are unpacked before use, to `dtype` (default: bfloat16). int8 chooses its outlier features
    by everything in the pass, so a tree may differ from its paths by a rounding error. int8-dynamic and int4-dynamic round
    every token by itself (`QuantizedLinear`); they are the fastest on a CPU.
    """
    if kind not in get_args(Quantization):
        raise InvalidInput(f"quantization is {kind!r}, expected one of {', '.join(get_args(Quantization))}")
    if kind == "none":
        return {}
    if kind in BITS:
        return {"quantization_config": kind}
    require("bitsandbytes", "quantized", f"{kind} quantization")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.bfloat16)
    return {"quantization_config": four_bit}


@register_quantization_config(METHOD)
class DynamicConfig(QuantizationConfigMixin):
    """What a saved backbone's config.json says of int8-dynamic and int4-dynamic weights."""

    def __init__(self, bits: int, layout: int = LAYOUT, quant_method: str = METHOD):
        if bits not in BITS.values() or layout != LAYOUT:
            raise InvalidInput(f"quantization_config has {bits} bits in layout {layout}, expected 4 or 8 in layout {LAYOUT}")
        self.bits, self.layout, self.quant_method = bits, layout, quant_method


@register_quantizer(METHOD)
class DynamicQuantizer(HfQuantizer):
    """transformers' hooks for int8-dynamic and int4-dynamic: saved backbones load by `from_pretrained`, packed as they are."""

    requires_calibration = True  # transformers loads only what is saved this way; `quantize_dynamic` makes it
    quantization_config: DynamicConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        quantize_maps(model, self.quantization_config.bits)  # type: ignore[arg-type]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float32):
            raise InvalidInput(
                f"int{self.quantization_config.bits}-dynamic is for bfloat16 or float32 models on a CPU, got "
                f"{model.dtype} on {model.device.type}; choose another --dtype or --device, or nf4"
            )

    def is_serializable(self) -> bool:
        return True

    is_trainable = False  # type: ignore[assignment]
    is_compileable = True  # type: ignore[assignment]


def quantize_dynamic(backbone: PreTrainedModel, bits: Literal[4, 8]) -> None:
    """Quantise the linear maps of a loaded backbone, in place, so that it is like one saved and loaded in this way."""
    quantizer = DynamicQuantizer(DynamicConfig(bits))
    quantizer._process_model_after_weight_loading(backbone)
    quantizer.preprocess_model(backbone)
    quantizer.postprocess_model(backbone)
    backbone.hf_quantizer = quantizer
    others = [part for part in (backbone.get_input_embeddings(), backbone.get_output_embeddings()) if part is not None]
    ends = {id(weight) for part in others for weight in part.parameters()}
    left = sum(weight.numel() for weight in backbone.parameters() if weight.ndim > 1 and id(weight) not in ends)
    maps = sum(part.in_features * part.out_features for part in backbone.modules() if isinstance(part, QuantizedLinear))
    if left > maps:
        name = type(backbone).__name__
        warnings.warn(f"most weights of {name} are not in linear layers and stay in {backbone.dtype}", stacklevel=2)


def quantization_of(config: PreTrainedConfig) -> str | None:
    """How a saved model is quantised: one of `Quantization`, or the name of transformers' method; None if it is not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    facts = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(facts.get("quant_method"), "value", facts.get("quant_method")))
    if method == "bitsandbytes":
        return "int8" if facts.get("load_in_8bit") else str(facts.get("bnb_4bit_quant_type"))
    return f"int{facts.get('bits')}-dynamic" if method == METHOD else method


def unpack_in_order(backbone: nn.Module) -> None:
    """Have the weights of a 4-bit backbone on a CPU stay the same when their `state_dict` is made.

    On CPUs with AVX-512, bitsandbytes packs 4-bit weights when they are first used. `state_dict` unpacks them, but leaves their
    scales transposed (seen with 0.50): the backbone would compute something else from then on.
    """
    for module in backbone.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.register_state_dict_post_hook(_restore_scales)


def _restore_scales(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    state = getattr(module.weight, "quant_state", None)
    if state is not None and state.absmax.ndim == 2:
        state.absmax = state.absmax.T.reshape(-1).float()
        state_dict[prefix + "weight.absmax"] = state.absmax


def make_differentiable(backbone: nn.Module) -> None:
    """Make gradients flow through a 4-bit backbone on a CPU.

    Once used without a gradient, 4-bit weights are repacked by bitsandbytes for CPUs with AVX-512 into a form that its
    backward pass does not support: gradients are silently wrong (seen with 0.50).
    """
    for module in backbone.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.state_dict()  # unpacks
