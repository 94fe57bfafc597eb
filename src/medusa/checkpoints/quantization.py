"""Quantised backbones: in 4 or 8 bits, through bitsandbytes or with our own kernels on a CPU."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from medusa.config import Quantization
from medusa.errors import InvalidInput
from medusa.runs.extras import require

BITS: dict[str, Literal[4, 8]] = {"int4-dynamic": 4, "int8-dynamic": 8}  # of weights that our own kernels read


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
