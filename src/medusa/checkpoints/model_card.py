"""The model card published with heads."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from medusa.config import MedusaConfig

CARD = """\
---
{metadata}
---

# Medusa heads{of}

{method} (Cai et al., 2024): {num_heads} heads, {num_layers} residual block{plural} each, {lm_head}.

    from medusa import MedusaModel
    model = MedusaModel.from_pretrained({load})
"""


def card_of_heads(config: MedusaConfig, method: str = "Medusa", merged: bool = False) -> str:
    """The beginning of the card of heads, or, if `merged`, of a model that holds them; training appends its measurements."""
    base_model, num_layers = config.base_model_name_or_path, config.medusa_num_layers
    on_hub = base_model if base_model and not Path(base_model).is_dir() else None  # the hub takes only its own ids
    metadata = ModelCardData(
        base_model=on_hub,
        library_name="medusa-decoding",
        pipeline_tag="text-generation",
        tags=["medusa", "speculative-decoding"],
    )
    return CARD.format(
        metadata=metadata.to_yaml(),
        of=f" for {base_model}" if base_model else "",
        method=method,
        num_heads=config.medusa_num_heads,
        num_layers=num_layers,
        plural="" if num_layers == 1 else "s",
        lm_head="predicting through the backbone's LM head" if config.medusa_shared_lm_head else "with their own LM heads",
        load='"this folder"' if merged else f'{base_model or "the backbone"!r}, heads="this folder"',
    )
