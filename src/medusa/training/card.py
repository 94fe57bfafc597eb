"""The model card that trained heads are saved with."""

from __future__ import annotations

from pathlib import Path

from medusa.training.config import TrainingConfig

CARD = """\
---
library_name: medusa-decoding
pipeline_tag: text-generation
tags: [medusa, speculative-decoding]{base_model}
---

# Medusa heads{of}

{method} (Cai et al., 2024): {num_heads} heads, {num_layers} residual block{plural} each, {lm_head}.

    from medusa import MedusaModel
    model = MedusaModel.from_pretrained({backbone!r}, heads="this folder")

{backbone_note}

| head | predicts | {ranks} |
|---|---|{rule}|
{accuracies}

Accuracy on {asked:,} held-out tokens. The tree here ({nodes} nodes) should accept {rate:.2f} tokens a step from them, if heads
err independently. Trained on {tokens:,} tokens, {labelled:,} of them labelled. Options, log and fingerprint of the data:
`training.json`.
"""
BACKBONE_NOTES = {
    "frozen": "The backbone was not changed: greedy output is its own, token for token.",
    "lora": "The backbone was trained with them: `adapter_model.safetensors` is its LoRA adapter, loaded with the heads.",
    "full": "The backbone was trained with them: this folder holds the whole model.",
}


def write_card(
    folder: Path,
    config: TrainingConfig,
    base_model: str | None,
    metrics: dict[str, float],
    asked: int,
    nodes: int,
    tokens: int,
    labelled: int,
) -> None:
    """Write `README.md`."""
    ranks = sorted({int(name.rpartition("top")[2]) for name in metrics if "_top" in name})
    lines = []
    for k in range(1, config.num_heads + 1):
        if f"eval_head{k}_top1" in metrics:
            row = " | ".join(f"{metrics[f'eval_head{k}_top{i}']:.3f}" for i in ranks)
            lines.append(f"| {k} | token t+{k + 1} | {row} |")
    text = CARD.format(
        base_model=f"\nbase_model: {base_model}" if base_model else "",
        of=f" for {base_model}" if base_model else "",
        method="Medusa-2" if config.joint else "Medusa-1",
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        plural="" if config.num_layers == 1 else "s",
        lm_head="predicting through the backbone's LM head" if config.shared_lm_head else "with LM heads of their own",
        backbone=base_model or "the backbone",
        backbone_note=BACKBONE_NOTES[config.backbone],
        ranks=" | ".join(f"top-{i}" for i in ranks),
        rule="|".join("---" for _ in ranks),
        accuracies="\n".join(lines),
        asked=asked,
        nodes=nodes,
        rate=metrics.get("eval_acceleration_rate", 1.0),
        tokens=tokens,
        labelled=labelled,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
