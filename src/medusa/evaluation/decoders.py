"""Decoders: ways to continue the same prompts on the same backbone; each reports the tokens it emitted and when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from medusa.errors import InvalidInput
from medusa.generation.mixin import Collected
from medusa.model import MedusaModel


@dataclass(frozen=True)
class Decoded:
    """A continued batch of prompts, or the turns of a conversation: one row each. Callers add `seconds` and `peak_bytes`."""

    tokens: list[list[int]]  # new tokens of each row
    lengths: list[list[int]]  # number of tokens that each decoding step of a row emitted
    steps: int  # decoding steps of the batch
    first_seconds: float  # seconds until the first token
    prefill_seconds: float  # seconds spent on the prompt
    prefill_tokens: int  # tokens decided by the prefill
    seconds: float = 0.0  # end to end
    peak_bytes: int | None = None  # peak memory

    @classmethod
    def together(cls, turns: Sequence[Decoded]) -> Decoded:
        """Consecutive runs as one; the first token is that of the first run."""
        peaks = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
        return cls(
            tokens=[row for turn in turns for row in turn.tokens],
            lengths=[row for turn in turns for row in turn.lengths],
            steps=sum(turn.steps for turn in turns),
            first_seconds=turns[0].first_seconds,
            prefill_seconds=sum(turn.prefill_seconds for turn in turns),
            prefill_tokens=sum(turn.prefill_tokens for turn in turns),
            seconds=sum(turn.seconds for turn in turns),
            peak_bytes=max(peaks, default=None),
        )


class Decoder(Protocol):
    """Continues a batch of prompts (B, P)."""

    def __call__(self, ids: Tensor) -> Decoded: ...

    def prepare(self, ids: Tensor) -> None:
        """Do the untimed work that prompts of this shape need once, such as compiling."""


class MedusaDecoder:
    """Our loop: plain decoding with the root-only tree, Medusa with any other.

    Args:
        tree: any tree that the model accepts; None: its own.
        options: options of `MedusaModel.stream`.
    """

    def __init__(self, model: MedusaModel, max_new_tokens: int, tree: Any = None, **options: Any):
        self._model, self._prepared = model, set[tuple[int, ...]]()
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "tree": tree, "do_sample": False, **options}

    def prepare(self, ids: Tensor) -> None:
        if self._options.get("compile") and tuple(ids.shape) not in self._prepared:
            self._prepared.add(tuple(ids.shape))
            steps = self._model.stream(ids, torch.ones_like(ids), **self._options)
            for _ in zip(range(3), steps):  # the first compiles; on a GPU the second records
                pass

    def __call__(self, ids: Tensor) -> Decoded:
        collected, first_seconds, prefill_seconds = Collected(len(ids)), 0.0, 0.0
        start = time.perf_counter()
        for step in collected.follow(self._model.stream(ids, torch.ones_like(ids), **self._options)):
            if len(collected.seconds) == 1:
                first_seconds, prefill_seconds = time.perf_counter() - start, step.prefill_seconds
        return Decoded(
            collected.tokens,
            collected.lengths,
            len(collected.seconds),
            first_seconds,
            prefill_seconds,
            prefill_tokens=len(ids),  # the prefill decides every row's first token
        )


class TransformersDecoder:
    """transformers' own `generate` on the same backbone, with the same limits.

    Args:
        draft: a smaller model that guesses tokens: speculative decoding (paper Appendix D).
        guesses: number of tokens guessed at a time, by the draft model or, without one, by prompt lookup; None: none.
        seed: seed of the draws, if `options` sample.
        options: options of `generate`.
    """

    def __init__(
        self,
        model: MedusaModel,
        max_new_tokens: int,
        draft: PreTrainedModel | None = None,
        guesses: int | None = None,
        seed: int = 0,
        **options: Any,
    ):
        if draft is not None and draft.config.get_text_config().vocab_size != model.vocab_size:
            raise InvalidInput(
                f"the draft model has {draft.config.get_text_config().vocab_size} tokens, the model {model.vocab_size}; "
                "speculative decoding needs one vocabulary"
            )
        self._model, self._draft, self._guesses, self._seed = model, draft, guesses, seed
        pad = model.backbone.generation_config.pad_token_id or 0
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "do_sample": False, **options}
        if draft is not None:
            self._options["assistant_model"] = draft
        elif guesses is not None:
            self._options["prompt_lookup_num_tokens"] = guesses

    def prepare(self, ids: Tensor) -> None:
        pass

    def __call__(self, ids: Tensor) -> Decoded:
        backbone, ids = self._model.backbone, ids.to(self._model.device)
        if self._draft is not None:  # transformers reads the draft model's own configuration
            config = self._draft.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = self._guesses, "constant"
            config.assistant_confidence_threshold = 0.0
        if self._options["do_sample"]:
            torch.manual_seed(self._seed)
        clock = _Clock(ids)
        output = backbone.generate(
            ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([clock]), **self._options
        )
        eos = self._options.get("eos_token_id") or self._model.eos_token_ids
        tokens, lengths = [], []
        for row in output[:, ids.shape[1] :].tolist():
            end = next((n for n, token in enumerate(row, 1) if token in eos), len(row))
            tokens.append(row[:end])
            lengths.append([min(b, end) - a for a, b in zip([0, *clock.ends], clock.ends) if a < end])
        return Decoded(tokens, lengths, len(clock.ends), clock.first, clock.first, clock.ends[0] * len(tokens))


class _Clock(StoppingCriteria):
    """Records the number of tokens after every step of `generate`, and the time of the first; never stops it."""

    def __init__(self, ids: Tensor):
        self.ends: list[int] = []
        self.first = 0.0
        self._prompt = ids.shape[1]
        self._go_on = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self._start = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ends.append(input_ids.shape[1] - self._prompt)
        if len(self.ends) == 1:
            input_ids[0, -1].item()  # waits for the device, as the loop does right after
            self.first = time.perf_counter() - self._start
        return self._go_on
