"""Logits processors: those transformers would apply, and what each of them may look at under a tree."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process as hf

from medusa.errors import InvalidInput
from medusa.sampling import Processors, Reads

# Processors that look at nothing but the scores are applied to all nodes at once.
CONTEXT_FREE = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
)
# Processors that count tokens from the start of the padded batch.
LENGTH_BASED = (
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.SuppressTokensAtBeginLogitsProcessor,
)
# Processors that carry state from call to call, or take a row of scores for a row of the batch.
REFUSED = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    hf.ClassifierFreeGuidanceLogitsProcessor,
    hf.SynthIDTextWatermarkLogitsProcessor,
    hf.PrefixConstrainedLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
)


def processors_for(
    backbone: PreTrainedModel,
    changes: dict[str, Any],
    prompt_length: int,
    given: LogitsProcessorList | None,
    device: torch.device,
) -> Processors:
    """The processors transformers' `generate` would apply, by the generation config and what the call changes in it.

    One departure: a top-k of 50 that nobody asked for is not applied.
    """
    config = copy.deepcopy(backbone.generation_config)
    config.update(**{name: value for name, value in changes.items() if value is not None})
    backbone._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device)
    return classify(
        backbone._get_logits_processor(
            config, input_ids_seq_length=prompt_length, logits_processor=LogitsProcessorList(given or []), device=device
        )
    )


def check_sampling(**settings: float | None) -> None:
    """Refuse settings that make no sense, by name; None is not set."""
    ranges = {
        "temperature": (lambda v: v > 0, "more than 0; for greedy decoding pass do_sample=False"),
        "top_k": (lambda v: v >= 0 and v == int(v), "an integer of at least 0, where 0 is off"),
        "top_p": (lambda v: 0 < v <= 1, "a number in (0, 1]"),
        "min_p": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        "repetition_penalty": (lambda v: v > 0, "more than 0"),
    }
    for name, value in settings.items():
        right, wanted = ranges[name]
        if value is not None and not right(value):
            raise InvalidInput(f"{name} is {value}, wanted {wanted}")


def classify(processors: list) -> Processors:
    """Mark each processor by what it looks at; refuse those that cannot follow a tree."""
    steps: list[tuple[Any, Reads]] = []
    for processor in processors:
        if isinstance(processor, REFUSED):
            name = type(processor).__name__
            raise InvalidInput(f"{name} keeps state between calls or counts rows, and cannot follow a tree of candidates")
        reads: Reads = "length" if isinstance(processor, LENGTH_BASED) else "tokens"
        # The very class: a subclass may look at more.
        steps.append((processor, "scores" if type(processor) in CONTEXT_FREE else reads))
    return Processors(tuple(steps))
