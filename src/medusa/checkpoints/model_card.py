"""The model card that heads are published with."""

from __future__ import annotations

from pathlib import Path

CARD = """\
---
library_name: medusa-decoding
pipeline_tag: text-generation
tags: [medusa, speculative-decoding]{base_model_line}
---

# Medusa heads{of}

{method} (Cai et al., 2024): {num_heads} heads, {num_layers} residual block{plural} each, {lm_head}.

    from medusa import MedusaModel
    model = MedusaModel.from_pretrained({load})
"""


def card(
    num_heads: int, num_layers: int, shared_lm_head: bool, base_model: str | None, method: str = "Medusa", merged: bool = False
) -> str:
    """What the heads are and how to load them: the head of a model card, to which a training adds what it measured.

    Args:
        merged: the folder holds the backbone too.
    """
    return CARD.format(
        # The hub knows its own names alone.
        base_model_line=f"\nbase_model: {base_model}" if base_model and not Path(base_model).is_dir() else "",
        of=f" for {base_model}" if base_model else "",
        method=method,
        num_heads=num_heads,
        num_layers=num_layers,
        plural="" if num_layers == 1 else "s",
        lm_head="predicting through the backbone's LM head" if shared_lm_head else "with LM heads of their own",
        load='"this folder"' if merged else f'{base_model or "the backbone"!r}, heads="this folder"',
    )
