"""Quantised backbones, held in 4 or 8 bits by bitsandbytes, on a CPU too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medusa.errors import InvalidInput
from medusa.runs.extras import require

KINDS = ("none", "nf4", "int8")


def quantized(kind: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What to pass to `from_pretrained` for a backbone of this kind.

    nf4 decodes exactly: its weights are unpacked before they are used. int8 sets features aside by what else is in the
    same pass, so that a tree may differ from its paths by a rounding.

    Args:
        dtype: that of the arithmetic; None: bfloat16.

    Raises:
        InvalidInput: unknown kind, or bitsandbytes is missing.
    """
    if kind not in KINDS:
        raise InvalidInput(f"quantization is {kind!r}, wanted one of {', '.join(KINDS)}")
    if kind == "none":
        return {}
    require("bitsandbytes", "quantized", f"{kind} quantization")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.bfloat16)
    return {"quantization_config": four_bit}


def make_differentiable(backbone: nn.Module) -> None:
    """Let gradients flow through a 4-bit backbone on a CPU.

    bitsandbytes repacks 4-bit weights for CPUs with AVX-512 once they are used without a gradient, into a form that its
    backward pass does not know: gradients through it are silently wrong (seen with 0.50).
    """
    for module in backbone.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.state_dict()  # unpacks
