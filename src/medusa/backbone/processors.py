"""Logits processors: what each of them reads, and whether an unknown one can follow a tree."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import logits_process as hf

from medusa.config import integer
from medusa.errors import InvalidInput
from medusa.processors.grammar import GrammarMask
from medusa.processors.penalties import RepetitionPenalty
from medusa.processors.warpers import Warpers
from medusa.sampling import LogitsProcessor, Processors, Reads, TreeProcessor


class LogitBias:
    """Adds a number to the score of each token, as OpenAI's `logit_bias` does.

    Args:
        bias: (V,) float32.
    """

    def __init__(self, bias: Tensor):
        self._bias = bias

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self._bias


# What processors read. The exact class: a subclass may read more.
READS: dict[type, Reads] = {
    # Nothing but the scores: applied to all nodes at once.
    hf.TemperatureLogitsWarper: "scores",
    hf.TopKLogitsWarper: "scores",
    hf.TopPLogitsWarper: "scores",
    hf.TopHLogitsWarper: "scores",
    hf.MinPLogitsWarper: "scores",
    hf.TypicalLogitsWarper: "scores",
    hf.EpsilonLogitsWarper: "scores",
    hf.EtaLogitsWarper: "scores",
    hf.SuppressTokensLogitsProcessor: "scores",
    hf.InfNanRemoveLogitsProcessor: "scores",
    hf.LogitNormalization: "scores",
    LogitBias: "scores",
    # A row's own tokens, never its padding.
    hf.RepetitionPenaltyLogitsProcessor: "tokens",  # replaced by ours
    hf.NoRepeatNGramLogitsProcessor: "tokens",
    hf.SequenceBiasLogitsProcessor: "tokens",
    hf.NoBadWordsLogitsProcessor: "tokens",
    hf.WatermarkLogitsProcessor: "tokens",
    hf.MinLengthLogitsProcessor: "tokens",
    hf.ForcedBOSTokenLogitsProcessor: "tokens",
    # The number of tokens since the end of the padded prompts, whose length they were given.
    hf.MinNewTokensLengthLogitsProcessor: "length",
    hf.ForcedEOSTokenLogitsProcessor: "length",
    hf.ExponentialDecayLengthPenalty: "length",
    hf.SuppressTokensAtBeginLogitsProcessor: "length",
}
# Those that rows may each have with a value of their own, in transformers' order: the field of `Warpers`.
PLAIN: dict[type, str] = {
    hf.TemperatureLogitsWarper: "temperature",
    hf.TopKLogitsWarper: "top_k",
    hf.TopPLogitsWarper: "top_p",
    hf.MinPLogitsWarper: "min_p",
}
# Those that transformers applies last.
WARPERS = (
    *PLAIN,
    hf.TopHLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.LogitNormalization,
)
# Processors that cannot follow a tree, with the setting that makes them.
REFUSED: dict[type, str] = {
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    hf.ClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    hf.SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
    hf.PrefixConstrainedLogitsProcessor: "prefix_allowed_tokens_fn",
    hf.EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size",
    hf.EncoderRepetitionPenaltyLogitsProcessor: "encoder_repetition_penalty",
}


def classify(
    processors: Sequence[LogitsProcessor],
    prompts: Tensor,  # (B, P) long, left-padded
    pads: Sequence[int],  # per row, number of padding slots
    vocab_size: int,
    unseen: int = 0,  # leading slots that hold no token (soft prompts)
    min_length_counts_padding: bool = False,  # it was made from min_new_tokens and the padded length
    own: Sequence[TreeProcessor] = (),  # our own, applied before the warpers
) -> Processors:
    """Mark each processor with what it reads; InvalidInput, which names it, for one that depends on more than a path."""
    steps: list[tuple[LogitsProcessor | TreeProcessor, Reads]] = []
    for processor in processors:
        kind = type(processor)
        for refused, setting in REFUSED.items():
            if isinstance(processor, refused):
                raise InvalidInput(
                    f"{kind.__name__} ({setting}) keeps state between calls or counts rows, and cannot follow a tree of "
                    f"candidates; leave {setting} out"
                )
        if kind not in READS:
            check_follows_paths(processor, prompts[0, max(0, pads[0] - unseen) :], vocab_size)
        reads = READS.get(kind, "tokens")
        if kind is hf.RepetitionPenaltyLogitsProcessor:
            steps.append((_of_tree(processor, pads, unseen), "tree"))
            continue
        if kind is hf.MinLengthLogitsProcessor and min_length_counts_padding:
            reads = "length"
        steps.append((processor, reads))
    first = next((place for place, (processor, _) in enumerate(steps) if type(processor) in WARPERS), len(steps))
    steps[first:first] = [(processor, "tree") for processor in own]
    return replace(
        _with_plain_warpers(steps), guide=next((processor for processor in own if isinstance(processor, GrammarMask)), None)
    )


def _with_plain_warpers(steps: list[tuple[LogitsProcessor | TreeProcessor, Reads]]) -> Processors:
    """The processors, of which the last that are plain warpers, in the usual order, are applied to all rows at once."""
    found: dict[str, Any] = {}
    order = [*PLAIN]
    while steps:
        processor = steps[-1][0]
        place = order.index(type(processor)) if type(processor) in order else None
        if place is None or not _is_plain(processor):
            break
        found[PLAIN[order[place]]] = getattr(processor, PLAIN[order[place]])
        steps, order = steps[:-1], order[:place]
    return Processors(tuple(steps), Warpers(**found))


def _is_plain(processor: Any) -> bool:
    """Whether a warper has no settings but its own."""
    return getattr(processor, "min_tokens_to_keep", 1) == 1 and getattr(processor, "filter_value", -torch.inf) == -torch.inf


def _of_tree(processor: Any, pads: Sequence[int], unseen: int) -> RepetitionPenalty:
    """Our form of transformers' repetition penalty, which may have been made to ignore padding or prompts."""
    ignored = processor.prompt_ignore_length
    if ignored is None or (isinstance(ignored, Tensor) and ignored.flatten().tolist() == list(pads)):
        return RepetitionPenalty(processor.penalty)  # it never sees padding
    if isinstance(ignored, int) and ignored >= max(pads) - unseen:
        return RepetitionPenalty(processor.penalty, ignored)  # the padding counts with the prompt that it ignores
    raise InvalidInput(
        f"RepetitionPenaltyLogitsProcessor has prompt_ignore_length {ignored}, the rows have {list(pads)} tokens of padding; "
        "pass one number, of at least the padding"
    )


def check_sampling(**settings: float | None) -> None:
    """Refuse settings that are out of range; None: not set."""
    ranges = {
        "temperature": (lambda v: v > 0, "more than 0; for greedy decoding pass do_sample=False"),
        "top_k": (lambda v: integer("top_k", v) >= 0, "an integer of at least 0, where 0 is off"),
        "top_p": (lambda v: 0 < v <= 1, "a number in (0, 1]"),
        "min_p": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        "repetition_penalty": (lambda v: v > 0, "more than 0"),
    }
    for name, value in settings.items():
        right, wanted = ranges[name]
        if value is not None and not right(value):
            raise InvalidInput(f"{name} is {value}, expected {wanted}")


def check_follows_paths(
    processor: Any,
    prompt: Tensor,  # (n,) long
    vocab_size: int,
) -> None:
    """Try out an unknown processor on copies, as a tree would call it.

    It may depend on the tokens of a path and the scores after it, and on nothing else: not on the number of calls, the
    paths before, or the row. So two copies see three paths in different orders, alone and as rows of a batch. Their scores
    must be equal, and so must the copies be afterwards: any difference is state.

    Raises:
        InvalidInput: it depends on more, or it cannot be called or copied.
    """
    name = getattr(processor, "__name__", type(processor).__name__)
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randint(vocab_size, (4,), generator=generator).to(prompt.device).split(1)
    paths = {"short": torch.cat([prompt, a]), "long": torch.cat([prompt, a, b]), "other": torch.cat([prompt, c, d])}
    scores = {path: torch.randn(vocab_size, generator=generator).to(prompt.device) for path in paths}

    def scored(process: Any, *names: str) -> list[tuple[str, Tensor]]:
        ids, given = torch.stack([paths[path] for path in names]), torch.stack([scores[path] for path in names])
        output = process(ids.clone(), given.clone())
        if not isinstance(output, Tensor) or output.shape != given.shape:
            raise ValueError(f"it gives {getattr(output, 'shape', type(output).__name__)} for scores of {tuple(given.shape)}")
        return list(zip(names, output, strict=True))

    try:
        one, two = _copy(processor), _copy(processor)
        if one is two and not isinstance(processor, FunctionType):
            raise ValueError("its copy is the object itself")
        before = copy.deepcopy(_shared(processor))
        answers = [answer for path in ("short", "long", "long", "other") for answer in scored(one, path)]
        answers += scored(one, "long", "other") + scored(two, "other", "long")
        answers += [answer for path in ("other", "long", "short") for answer in scored(two, path)]
        same = _same(one, two) and _same(before, _shared(processor))
    except Exception as error:  # foreign code may raise anything
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InvalidInput(
            f"{name} cannot be called on copies for the paths of a tree, in any order and several at once: {reason}"
        ) from error
    first = dict(reversed(answers))
    if not all(torch.allclose(output, first[path], rtol=1e-4, atol=1e-5, equal_nan=True) for path, output in answers):
        raise InvalidInput(
            f"{name} scores a path by the calls before it or by its row in the batch, and cannot follow a tree of candidates; "
            "leave it out, or make it a function of the ids and scores that it gets"
        )
    if not same:
        raise InvalidInput(
            f"{name} keeps state from call to call, and cannot follow a tree of candidates; leave it out, or make it a "
            "function of the ids and scores that it gets"
        )


def _is_constant(value: Any) -> bool:
    """Whether a value is a model or tokenizer: too large to copy, and not state."""
    return isinstance(value, torch.nn.Module | PreTrainedTokenizerBase)


def _attributes(processor: Any) -> list[Any]:
    return list(getattr(processor, "__dict__", {}).values())


def _copy(processor: Any) -> Any:
    return copy.deepcopy(processor, {id(value): value for value in _attributes(processor) if _is_constant(value)})


def _shared(processor: Any) -> list[Any]:
    """Variables that copies share and calls may change: those of its functions and of its class."""
    variables: list[Any] = []
    for part in (processor, getattr(processor, "func", None), *_attributes(processor)):
        if isinstance(part, FunctionType):
            cells = [cell.cell_contents for cell in part.__closure__ or ()]
            variables += [*cells, part.__dict__, part.__defaults__, part.__kwdefaults__]
    data = int | float | str | list | dict | set | Tensor
    for cls in type(processor).__mro__:
        variables += [value for name, value in vars(cls).items() if isinstance(value, data) and not name.startswith("__")]
    return [value for value in variables if not _is_constant(value)]


def _same(one: Any, two: Any, seen: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Whether two objects are equal, all the way down."""
    if one is two or (id(one), id(two)) in seen:
        return True
    if type(one) is not type(two):
        return False
    seen |= {(id(one), id(two))}
    if isinstance(one, Tensor):
        return one.shape == two.shape and one.dtype == two.dtype and torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two)
    if isinstance(one, torch.Generator):
        return torch.equal(one.get_state(), two.get_state())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key], seen) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(_same(a, b, seen) for a, b in zip(one, two, strict=True))
    if one is None or isinstance(one, int | float | complex | str | bytes | set | frozenset | type):
        return bool(one == two)
    # Anything else: compare what would be pickled.
    return _same(_parts(one), _parts(two), seen)


def _parts(value: Any) -> list[Any]:
    reduced = value.__reduce_ex__(4)
    return [list(part) if isinstance(part, Iterator) else part for part in reduced] if isinstance(reduced, tuple) else [reduced]
