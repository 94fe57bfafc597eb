"""The model card that trained heads are saved with."""

from __future__ import annotations

from pathlib import Path

from medusa.checkpoints.model_card import card_of_heads
from medusa.config import MedusaConfig
from medusa.runs.files import write_text
from medusa.training.config import TrainingConfig
from medusa.training.data import Rows

MEASURED = """\

{backbone_note}

| head | predicts | {ranks} |
|---|---|{rule}|
{accuracies}

Accuracy on {asked:,} tokens {measured_on}. The tree here ({nodes} nodes) should accept {rate:.2f} tokens per step, if heads err
independently. Trained on {tokens:,} tokens, {labelled:,} of them labelled. Options, log and fingerprint of the data:
`training.json`.
"""
BACKBONE_NOTES = {
    "frozen": "The backbone was not changed: greedy output equals its own, token for token.",
    "lora": "The backbone was trained with them: `adapter_model.safetensors` is its LoRA adapter, loaded with the heads.",
    "full": "The backbone was trained with them: this folder holds the whole model.",
}


def write_card(
    folder: Path,
    config: TrainingConfig,
    heads: MedusaConfig,
    metrics: dict[str, float],
    asked: int,
    nodes: int,
    rows: Rows,
    held_out: bool,
) -> None:
    """Write `README.md`: what the heads are, how to load them, and their accuracies."""
    ranks = sorted({int(name.rpartition("top")[2]) for name in metrics if "_top" in name})
    lines = []
    for k in range(1, config.num_heads + 1):
        if f"eval_head{k}_top1" in metrics:
            row = " | ".join(f"{metrics[f'eval_head{k}_top{i}']:.3f}" for i in ranks)
            lines.append(f"| {k} | token t+{k + 1} | {row} |")
    method = "Medusa-2" if config.joint else "Medusa-1"
    head = card_of_heads(heads, method, merged=config.backbone == "full")
    measured = MEASURED.format(
        backbone_note=BACKBONE_NOTES[config.backbone],
        ranks=" | ".join(f"top-{i}" for i in ranks),
        rule="|".join("---" for _ in ranks),
        accuracies="\n".join(lines),
        asked=asked,
        measured_on="held out" if held_out else "of training rows, which flatters the heads",
        nodes=nodes,
        rate=metrics.get("eval_acceleration_rate", 1.0),
        tokens=rows.tokens,
        labelled=rows.labelled,
    )
    write_text(folder / "README.md", head + measured)
