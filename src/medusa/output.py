"""The output: decoding steps put together into sequences, in the conventions of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from medusa.decoding import DecodingStep


@dataclass
class MedusaGenerateOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns."""

    sequences: Tensor | None = None  # (B, P + new) long, right-padded
    steps: int | None = None  # decoding steps until the last row finished
    acceptance_lengths: list[list[int]] | None = None  # per row, tokens emitted by each of its steps
    finish_reasons: list[str] | None = None  # per row: eos, stop or length
    timings: dict[str, float] | None = None  # seconds: first_step (with the prefill), total


def collect(
    steps: Iterator[DecodingStep],
    input_ids: Tensor,  # (B, P) long
    pad: int,  # fills rows that finished early
    streamer: Any = None,
) -> MedusaGenerateOutput:
    """Run the steps to the end and put the rows together; a streamer gets the prompt, then tokens as they come."""
    generated: list[list[int]] = [[] for _ in range(len(input_ids))]
    lengths: list[list[int]] = [[] for _ in range(len(input_ids))]
    seconds, reasons = [], []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for step in steps:
        for row, tokens in enumerate(step.tokens):
            generated[row] += tokens
            if tokens:
                lengths[row].append(len(tokens))
        seconds.append(step.seconds)
        reasons = step.finish_reasons
        if streamer is not None:
            for token in step.tokens[0]:
                streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    width = max(map(len, generated))
    new = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens in generated])
    return MedusaGenerateOutput(
        sequences=torch.cat([input_ids, new.to(input_ids)], dim=1),
        steps=len(seconds),
        acceptance_lengths=lengths,
        finish_reasons=[reason or "length" for reason in reasons],
        timings={"first_step": seconds[0], "total": sum(seconds)},
    )
