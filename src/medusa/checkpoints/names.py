"""Names: the tensor names of a head in each format.

| format | residual block l of head k | its LM head |
|---|---|---|
| ours, v0.1, v2 | `{k}.{l}.linear.weight` | `{k}.{L}.weight` |
| merged (v1.0) | `medusa_head.{k}.{l}.linear.weight` | `medusa_head.{k}.{L}.weight` |
| NVIDIA ModelOpt | `medusa_heads.{k}.{l}.linear.weight` | `medusa_heads.{k}.{L}.weight` |
| vLLM | `blocks.{k}.layers.{l}.weight` | `lm_heads.{k}.weight`, or one `lm_head.weight` for all |

and the same with `bias`. Heads that read tokens do so with `{k}.0.tokens.weight`, in our formats alone.
ModelOpt's names are those of its exporter (NVIDIA/Model-Optimizer,
modelopt/torch/export/plugins/mcore_llama.py) and of its reader (NVIDIA/TensorRT-LLM,
tensorrt_llm/models/medusa/weight.py). vLLM drops a `medusa_heads.` before its own names (vllm/model_executor/models/medusa.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WANTED = "0.0.linear.weight, medusa_head.0.0.linear.weight, medusa_heads.0.0.linear.weight or blocks.0.layers.0.weight"
ONE_LM_HEAD = "lm_head.weight"  # vLLM's name for one LM head shared by all heads
TOKEN_MAP = "token_map"  # vLLM's name for the token ids that heads score, if not the whole vocabulary

_IN_SEQUENCE = re.compile(r"(medusa_heads?\.)?(\d+)\.(\d+)\.(linear\.|tokens\.(?=weight))?(weight|bias)")
_BLOCK = re.compile(r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_LM_HEAD = re.compile(r"(?:medusa_heads\.)?lm_heads\.(\d+)\.(weight|bias)")
_PREFIXES = {"v0.1": "", "merged": "medusa_head.", "modelopt": "medusa_heads."}
TOKEN_MAPS = tuple(prefix + TOKEN_MAP for prefix in _PREFIXES.values())


@dataclass(frozen=True)
class Part:
    """The meaning of a name: weight or bias of a residual block of a head, or of its LM head (layer None)."""

    style: str  # v0.1, merged, modelopt or vllm
    head: int
    layer: int | None
    kind: str  # weight, bias or, of a block that reads tokens, tokens
    place: int | None = None  # index of an LM head among its head's modules (L), if the name contains it


def parse(name: str) -> Part | None:
    """Parse a tensor name of any format; None if it does not belong to a head."""
    if match := _IN_SEQUENCE.fullmatch(name):
        prefix, head, place, module, kind = match.groups()
        style = next(style for style, known in _PREFIXES.items() if known == (prefix or ""))
        kind = "tokens" if module == "tokens." else kind
        return Part(style, int(head), int(place) if module else None, kind, None if module else int(place))
    if match := _BLOCK.fullmatch(name):
        return Part("vllm", int(match[1]), int(match[2]), match[3])
    if match := _LM_HEAD.fullmatch(name):
        return Part("vllm", int(match[1]), None, match[2])
    return None


def belongs_to_heads(name: str) -> bool:
    """Whether a tensor in a whole model's files belongs to the heads, even if its name is unknown."""
    return name.startswith((_PREFIXES["merged"], _PREFIXES["modelopt"]))


def ours(part: Part, num_layers: int) -> str:
    """The name in our files, which is the parameter name in `MedusaHeads`."""
    if part.kind == "tokens":
        return f"{part.head}.{part.layer}.tokens.weight"
    middle = num_layers if part.layer is None else f"{part.layer}.linear"
    return f"{part.head}.{middle}.{part.kind}"


def in_style(name: str, style: str) -> str:
    """Translate one of our tensor names into another style.

    >>> in_style("2.0.linear.weight", "vllm"), in_style("2.1.weight", "vllm"), in_style("2.1.weight", "merged")
    ('blocks.2.layers.0.weight', 'lm_heads.2.weight', 'medusa_head.2.1.weight')
    """
    if style != "vllm" or name == TOKEN_MAP:
        return _PREFIXES.get(style, "") + name
    head, place, *_, kind = name.split(".")
    return f"blocks.{head}.layers.{place}.{kind}" if ".linear." in name else f"lm_heads.{head}.{kind}"
