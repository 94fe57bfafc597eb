"""Shapes: the sizes of a model that determine its costs, built in or read from a config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa.checkpoints.hub import Source, local_model
from medusa.errors import CheckpointError, ConfigError, one_line

# Models whose MLP has no gate: one matrix up, one down. Their configs do not say so.
UNGATED = (
    "apertus", "arcee", "biogpt", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "jais2",
    "gpt_neox_japanese", "mpt", "nanochat", "nemotron", "opt", "persimmon", "phi", "starcoder2", "xglm",
)  # fmt: skip
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder whose layers are all alike."""

    hidden: int
    intermediate: int  # width of the MLP that every token passes; 0 if there are only experts
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True
    # experts, experts_chosen, expert_intermediate: sizes of a mixture of experts; 0 if there is none.
    experts: int = 0
    experts_chosen: int = 0
    expert_intermediate: int = 0


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> ModelShape:
    return ModelShape(hidden, intermediate, layers, heads, heads, 128, 32000)


BUILT_IN = {  # the paper's models, and Llama 3's
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52),
    "llama-3-8b": ModelShape(4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3-70b": ModelShape(8192, 28672, 80, 64, 8, 128, 128256),
}


def load_shape(name: str, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a built-in model, or of the config in a folder or under a hub id; no weights are fetched.

    Raises:
        CheckpointError: there is no such config.
        ConfigError: it lacks a size, or describes what is not modelled.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    from transformers import AutoConfig, PreTrainedConfig

    try:
        repository, _, revision = name.partition("@")
        source = local_model(name) or Source(Path(repository))
        where = {"gguf_file": source.gguf_file} if source.gguf_file is not None else {"revision": revision or None}
        raw, _ = PreTrainedConfig.get_config_dict(source.folder, **where)
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, **where)
    except Exception as error:  # config classes, the hub and remote code raise errors of many kinds
        known = ", ".join(BUILT_IN)
        raise CheckpointError(f"no model config for {name!r} (built in: {known}): {one_line(error)}") from None
    text = config.get_text_config()
    absent = [field for field in NEEDED if field not in raw and text.attribute_map.get(field) not in raw]
    if absent and text is config:  # transformers would fill in the sizes of some other model
        raise ConfigError(f"the config of {name} lacks {', '.join(absent)}; expected the sizes of a decoder with attention")
    return shape_of(text)


def shape_of(config: Any) -> ModelShape:
    """The shape that a transformers text config describes; ConfigError if it lacks a size or describes what is not modelled.

    Layers are assumed to be alike: if only some have experts, or attend to a window, the costs are those of a full layer.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "kv_lora_rank", None):
        raise ConfigError(f"{kind} keeps its keys and values compressed (kv_lora_rank), which is not modelled")
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        raise ConfigError(f"{kind} has layers of linear attention, which are not modelled")
    for name in NEEDED:
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"the {kind} config has {name} = {value!r}, expected a positive integer")
    hidden, heads = config.hidden_size, config.num_attention_heads
    experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts") or 0
    intermediate = _first(config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or 4 * hidden
    expert_intermediate = 0
    if experts:
        expert_intermediate = _first(config, "moe_intermediate_size") or intermediate
        shared = _first(config, "n_shared_experts") or int(kind == "llama4_text")
        intermediate = _first(config, "shared_expert_intermediate_size") or shared * expert_intermediate
    chosen = _first(config, "num_experts_per_tok", "num_experts_per_token", "top_k_experts") or 0
    if experts and not 1 <= chosen <= experts:
        raise ConfigError(f"the {kind} config has {experts} experts but not how many of them each token passes")
    one_key = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    return ModelShape(
        hidden=hidden,
        intermediate=intermediate,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=1 if one_key else _first(config, "num_key_value_heads", "num_kv_heads") or heads,
        head_dim=_first(config, "head_dim") or hidden // heads,
        vocabulary=config.vocab_size,
        gated=kind not in UNGATED,
        experts=experts,
        experts_chosen=chosen if experts else 0,
        expert_intermediate=expert_intermediate,
    )


def _first(config: Any, *names: str) -> int | None:
    """The first of these fields that is set; keys unknown to the config's class do not affect the model."""
    fields = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    known = (name for name in names if name in fields or "vocab_size" not in fields)  # classes of old declare no fields
    return next((value for name in known if (value := getattr(config, name, None))), None)
