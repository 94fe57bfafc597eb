"""Generation: `stream`, `generate` and `custom_generate` in the conventions of transformers, and what they return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.utils import ModelOutput

from medusa.acceptance import TypicalAcceptance
from medusa.decoding import DecodingStep, check_prompts
from medusa.errors import InvalidInput
from medusa.generation.preparation import OwnOptions, Preparable, Prepared, handed_over, prepare
from medusa.processors.grammar import Grammar
from medusa.trees.files import Tree


@dataclass
class MedusaGenerateOutput(ModelOutput):
    """The output of `generate(return_dict_in_generate=True)`."""

    sequences: Tensor | None = None  # (B, P + new) long, right-padded
    steps: int | None = None  # decoding steps until the last row finished
    acceptance_lengths: list[list[int]] | None = None  # per row, tokens emitted by each of its steps
    finish_reasons: list[str] | None = None  # per row: eos, stop or length
    timings: dict[str, float] | None = None  # seconds: first_step (with the prefill), total

    def new_tokens(self, row: int) -> Tensor:  # (n,) long
        """The new tokens of a row, without padding."""
        assert self.sequences is not None and self.acceptance_lengths is not None
        counts = [sum(lengths) for lengths in self.acceptance_lengths]
        start = self.sequences.shape[1] - max(counts)
        return self.sequences[row, start : start + counts[row]]


class Collected:
    """The tokens that decoding steps emit, collected row by row as the steps pass.

    >>> collected = Collected()
    >>> for step in collected.follow([DecodingStep([[5, 8]], [None], 0.1), DecodingStep([[2]], ["eos"], 0.1)]):
    ...     print(step.tokens[0])
    [5, 8]
    [2]
    >>> collected.tokens, collected.lengths, collected.finish_reasons
    ([[5, 8, 2]], [[2, 1]], ['eos'])
    """

    def __init__(self, batch: int = 1):
        self.tokens: list[list[int]] = [[] for _ in range(batch)]  # per row
        self.lengths: list[list[int]] = [[] for _ in range(batch)]  # per row, the tokens of each of its steps
        self.finish_reasons: list[str | None] = [None] * batch
        self.seconds: list[float] = []  # of every step of the batch

    def follow(self, steps: Iterable[DecodingStep]) -> Iterator[DecodingStep]:
        """The same steps, each collected before it is passed on."""
        for step in steps:
            for row, tokens in enumerate(step.tokens):
                if tokens:
                    self.tokens[row] += tokens
                    self.lengths[row].append(len(tokens))
            self.finish_reasons = step.finish_reasons
            self.seconds.append(step.seconds)
            yield step


class MedusaGenerationMixin:
    """The methods that decode, in transformers' conventions; `MedusaModel` has them."""

    def stream(
        self: Preparable, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Iterator[DecodingStep]:
        """Decode step by step, with the arguments of `generate`; they are checked here, before the first step."""
        return _prepare(self, "stream", input_ids, attention_mask, options).decode(self)

    def generate(
        self: Preparable,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        streamer: Any = None,
        **options: Any,
    ) -> Tensor | MedusaGenerateOutput:
        """Generate as transformers' `generate` does, which prepares the call; `docs/architecture.md` says what is exact.

        Every key of transformers' `GenerationConfig` and every argument of its `generate` is followed or refused.
        An argument that is None counts as not given; the generation config then decides. Two defaults differ: top-k is off
        (transformers: 50), and without a length there are 256 new tokens, or as many as fit the model.

        Args:
            input_ids: (B, P) long, left-padded.
            attention_mask: (B, P), 1 for tokens; None: transformers recognises padding by the pad id.
            streamer: a transformers streamer, for a batch of one: gets the prompt, then tokens as they come.
            max_new_tokens, do_sample, temperature, repetition_penalty, eos_token_id, …: keys of a generation config.
            generation_config: a complete generation config instead.
            stop_strings: strings that end a row, with `tokenizer`.
            stopping_criteria, logits_processor: transformers' lists. An unknown processor is tried out, and refused if it
                keeps state from call to call.
            inputs_embeds: (B, L, d), a soft prompt that replaces the embeddings of `input_ids`.
            acceptance: "exact" (lossless) or "typical" (paper 2.3.1; requires do_sample).
            epsilon, delta: thresholds of typical acceptance.
            seed: seed of the draws; default: drawn from torch's generator, so that `torch.manual_seed` decides.
            tree: the tree of this call: `MedusaTree` (`MedusaTree([])` decodes plainly), `DynamicTree` or `TreeChoice`.
            compile: make each step one graph of static shapes: by torch.compile on a CPU, recorded as CUDA graphs on a GPU.
            presence_penalty, frequency_penalty: subtracted from the score of a token that has been generated: once, and once
                for each time (OpenAI's meaning; the prompt does not count).
            grammar: a `Grammar` that the continuation follows: JSON of a schema, a regex, a choice or Lark.

        Returns:
            (B, P + new) long, right-padded; MedusaGenerateOutput if return_dict_in_generate is set.

        Raises:
            InvalidInput, ContextOverflow, InvalidTree: before any work is done.
        """
        prepared = _prepare(self, "generate", input_ids, attention_mask, options)
        if streamer is not None and len(prepared.input_ids) > 1:
            raise InvalidInput(f"a streamer takes one row, got {len(prepared.input_ids)}; use model.stream for batches")
        return _output(self, prepared, streamer, home=input_ids.device if input_ids is not None else None)

    def custom_generate(
        self: Preparable,
        backbone: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        acceptance: Literal["exact", "typical"] = "exact",
        epsilon: float = TypicalAcceptance.epsilon,
        delta: float = TypicalAcceptance.delta,
        seed: int | None = None,
        tree: Tree | None = None,
        compile: bool = False,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        grammar: Grammar | None = None,
        **model_kwargs: Any,  # transformers would give an attention_mask named here twice
    ) -> Tensor | MedusaGenerateOutput:
        """For `backbone.generate(..., custom_generate=model.custom_generate)`: transformers prepares, Medusa decodes.

        Also takes Medusa's own arguments of `generate`. transformers does not pass on a streamer or tokenizer: call
        `MedusaModel.generate` for streaming and stop strings.

        Raises:
            InvalidInput: a tree cannot follow a setting, processor or model input, which is named.
        """
        if backbone is not self.backbone:
            raise InvalidInput("this Medusa model was made for another backbone object")
        own = OwnOptions(acceptance, epsilon, delta, seed, tree, compile, presence_penalty, frequency_penalty, grammar)
        prepared = handed_over(
            self, own, backbone, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
        )
        return _output(self, prepared)


def _prepare(
    model: Preparable, method: str, input_ids: Tensor | None, attention_mask: Tensor | None, options: dict[str, Any]
) -> Prepared:
    if input_ids is not None and "inputs_embeds" not in options:
        input_ids, mask = check_prompts(model, input_ids, attention_mask)
        attention_mask = mask if mask is not None or attention_mask is None else torch.ones_like(input_ids)
    return prepare(model, method, {"input_ids": input_ids, "attention_mask": attention_mask, **options})


def _output(
    model: Preparable, prepared: Prepared, streamer: Any = None, home: torch.device | None = None
) -> Tensor | MedusaGenerateOutput:
    """Decode a prepared call to its end.

    Args:
        home: device of the output; None: that of the prepared ids.
    """
    ids = prepared.input_ids.to(home or prepared.input_ids.device)
    collected = Collected(len(ids))
    if streamer is not None:
        streamer.put(ids.cpu())
    for step in collected.follow(prepared.decode(model)):
        if streamer is not None:
            for token in step.tokens[0]:
                streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    width = max(map(len, collected.tokens))
    new = torch.tensor([tokens + [prepared.pad_token_id] * (width - len(tokens)) for tokens in collected.tokens])
    sequences = torch.cat([ids, new.to(ids)], dim=1)
    if not prepared.return_dict:
        return sequences
    return MedusaGenerateOutput(
        sequences=sequences,
        steps=len(collected.seconds),
        acceptance_lengths=collected.lengths,
        finish_reasons=[reason or "length" for reason in collected.finish_reasons],
        timings={"first_step": collected.seconds[0], "total": sum(collected.seconds)},
    )
