"""Tiny random models, heads and trees that the tests decode with."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from medusa import MedusaHeads, MedusaTree

VOCAB = 64
DERIVED = object()  # a size that the config derives by itself
HYBRID = ["sliding_attention", "full_attention"] * 2

# Architectures of the design, with what their configs need beyond the common sizes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "phi": {},
    "phi3": {"sliding_window": None},
    "gemma": {},
    "gemma2": {"sliding_window": 512, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 512, "layer_types": HYBRID, "query_pre_attn_scalar": 16},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "olmo2": {},
    "olmo3": {"sliding_window": 512},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"sliding_window": 512},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "smollm3": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": DERIVED},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "head_dim": DERIVED,
    },
    "llama4_text": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 512,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 512},
}
# Their windows far below the length decoded, so that the window cuts.
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 12},
    "phi3": {"sliding_window": 12},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 12, "layer_types": HYBRID, "query_pre_attn_scalar": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
    "qwen3": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "llama4_text": {**ARCHITECTURES["llama4_text"], "attention_chunk_size": 8},
}


def tiny_backbone(
    model_type: str = "llama",
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    gain: float = 4.0,
    **overrides: Any,
) -> PreTrainedModel:
    """A random causal LM of four layers that never says eos unless told to; a gain above 1 keeps its logits from being flat."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    sizes.update(ARCHITECTURES.get(model_type, {}))
    sizes.update(overrides)
    sizes = {name: size for name, size in sizes.items() if size is not DERIVED}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes)
    chosen = {"attn_implementation": attention} if attention else {}
    backbone = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    backbone.generation_config.eos_token_id = sizes["eos_token_id"]
    backbone.generation_config.pad_token_id = 0
    return backbone


def random_heads(
    backbone: PreTrainedModel, num_heads: int = 3, num_layers: int = 1, shared: bool = False, **reads: Any
) -> MedusaHeads:
    """Heads with random weights, for a backbone."""
    heads = MedusaHeads.for_lm_head(backbone.get_output_embeddings(), num_heads, num_layers, shared, **reads)
    generator = torch.Generator().manual_seed(num_heads)
    with torch.no_grad():
        for parameter in heads.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise)
    return heads


def random_tree(seed: int, nodes: int, depth: int = 3, ranks: int = VOCAB) -> MedusaTree:
    """A random prefix-closed tree; with many ranks of a small vocabulary, random heads are often right."""
    chance = random.Random(seed)
    paths: set[tuple[int, ...]] = set()
    while len(paths) < nodes - 1:
        parents = [path for path in paths if len(path) < depth]
        parent = chance.choice([(), *parents]) if parents else ()
        paths.add((*parent, chance.randrange(ranks)))
    return MedusaTree(paths)


def random_prompt(length: int, seed: int = 0) -> torch.Tensor:
    """(1, length) long."""
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths as one batch with its attention mask."""
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt[0]
        mask[row, width - prompt.shape[1] :] = 1
    return ids, mask


def plain_greedy(backbone: PreTrainedModel, prompt: torch.Tensor, max_new_tokens: int, **options: Any) -> list[int]:
    """transformers' own greedy continuation of one prompt."""
    output = backbone.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return output[0, prompt.shape[1] :].tolist()
