"""Preparation: transformers' `generate` turns the arguments of a call into what the loop needs."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from medusa.acceptance import TypicalAcceptance
from medusa.backbone.lm import token_ids
from medusa.backbone.processors import check_sampling, classify
from medusa.batch.rows import DecodingOptions, StoppingCriterion
from medusa.batch.state import Decodable
from medusa.config import integer
from medusa.decoding import DecodingStep, decode
from medusa.errors import InvalidInput, MedusaError
from medusa.generation.settings import SAMPLING_KEYS, check_names, refuse, refuse_settings
from medusa.processors.grammar import Grammar, GrammarMask
from medusa.processors.penalties import OccurrencePenalty
from medusa.sampling import TreeProcessor
from medusa.trees.files import Tree

DEFAULT_MAX_NEW_TOKENS = 256
# Inputs of the pass over the prompt: caches, and what does not change the last hidden state or is ours to decide.
CACHES = ("past_key_values", "cache", "cache_params")
OURS_TO_SAY = ("use_cache", "return_dict", "logits_to_keep", "num_logits_to_keep", "cache_position")


@dataclass(frozen=True)
class OwnOptions:
    """Medusa's own keywords of a call; see `MedusaModel.generate`."""

    acceptance: str = "exact"
    epsilon: float = TypicalAcceptance.epsilon
    delta: float = TypicalAcceptance.delta
    seed: int | None = None
    tree: Tree | None = None
    compile: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    grammar: Grammar | None = None

    def __post_init__(self):
        if self.acceptance not in ("exact", "typical"):
            raise InvalidInput(f"acceptance is {self.acceptance!r}, expected 'exact' or 'typical'")
        for name in ("epsilon", "delta"):
            if self.acceptance == "exact" and getattr(self, name) != getattr(TypicalAcceptance, name):
                raise InvalidInput(f"{name} is for typical acceptance; pass acceptance='typical' or leave {name} out")
        if self.seed is not None:
            integer("seed", self.seed)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
                raise InvalidInput(f"{name} is {value!r}, expected a number, where 0 is off")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InvalidInput(
                f"grammar is a {type(self.grammar).__name__}, expected a Grammar, such as Grammar.json(schema, tokenizer)"
            )
        if self.tree is not None and not isinstance(self.tree, Tree):
            raise InvalidInput(
                f"tree is a {type(self.tree).__name__}, expected a MedusaTree or DynamicTree; load a file with load_tree"
            )

    @property
    def typical(self) -> TypicalAcceptance | None:
        """The thresholds of typical acceptance; None: acceptance is exact."""
        return TypicalAcceptance(self.epsilon, self.delta) if self.acceptance == "typical" else None

    def processors(self, eos_token_ids: tuple[int, ...]) -> list[TreeProcessor]:
        """Our own logits processors, in order."""
        found: list[TreeProcessor] = []
        if self.presence_penalty or self.frequency_penalty:
            found.append(OccurrencePenalty(self.presence_penalty, self.frequency_penalty))
        if self.grammar is not None:
            found.append(GrammarMask(self.grammar, eos_token_ids))
        return found


OWN = frozenset(OwnOptions.__dataclass_fields__)


@dataclass(frozen=True)
class Prepared:
    """A prepared call: what the loop and the output need."""

    input_ids: Tensor  # (B, P) long: the output begins with them
    attention_mask: Tensor | None  # (B, P), or (B, L)
    embeds: Tensor | None  # (B, L, d), L >= P: a soft prompt that replaces the embeddings of the ids
    options: DecodingOptions
    tree: Tree | None  # None: that of the model
    pad_token_id: int  # fills rows that finished early
    return_dict: bool
    compiled: bool  # make each step one graph

    def decode(self, model: Any) -> Iterator[DecodingStep]:
        """The steps of this call on a `MedusaModel`. Errors are raised now, not at the first step."""
        tree, ids = model.tree if self.tree is None else self.tree, self.input_ids
        if self.compiled:
            model = model.compiled
        if self.embeds is not None:  # a token for every slot; those of the soft prompt are never read
            ids = torch.nn.functional.pad(ids, (self.embeds.shape[1] - ids.shape[1], 0))
            model = _Reading(model, self.embeds)
        steps = decode(model, ids, self.attention_mask, tree, self.options)
        return steps if model.ranks is None else model.ranks.shared(steps)


class _Reading:
    """A model for the loop that reads the prompt from embeddings."""

    def __init__(self, model: Any, embeds: Tensor):
        self._model, self._embeds = model, embeds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prefill(self, ids: Tensor, attention_mask: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
        return self._model.prefill(ids, attention_mask, cache, self._embeds.to(ids.device))


class Preparable(Decodable, Protocol):
    """What preparing a call needs from a model; `MedusaModel` provides it."""

    backbone: PreTrainedModel


def prepare(
    model: Preparable,
    method: str,  # name of the method called, for errors
    options: dict[str, Any],
) -> Prepared:
    """Prepare a call: transformers' own `generate` does it and passes the result to `handed_over`.

    Two defaults differ: top-k is off (transformers: 50), and without a length there are 256 new tokens.

    Args:
        options: keywords of the call, with `input_ids` and `attention_mask`; None counts as not given.

    Raises:
        InvalidInput: an argument cannot be followed, and is named, or transformers refuses it.
    """
    options = {name: value for name, value in options.items() if value is not None}
    # transformers wants int and float, which numpy's numbers are not.
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    own = OwnOptions(**{name: options.pop(name) for name in OWN & options.keys()})
    check_names(model.backbone, method, options, OWN)
    config, defaults = options.get("generation_config"), _defaults(model, options)
    if config is not None:  # transformers takes either a config or keywords
        options["generation_config"] = copy.deepcopy(config)
        options["generation_config"].update(**defaults)
    else:
        options |= defaults
    if "max_new_tokens" in options:
        options["max_new_tokens"] = integer("max_new_tokens", options["max_new_tokens"], least=1)
    if isinstance(eos := options.get("eos_token_id"), list | tuple | Tensor) and len(token_ids(eos)) == 0:
        options["eos_token_id"] = None  # transformers' way of saying "none"
    if (strings := _setting(model, options, "stop_strings")) is not None:
        # transformers does not pass the tokenizer to a custom loop, so the criterion is made here.
        criterion = _stop_strings(strings, options.get("tokenizer"))
        options |= {"stop_strings": None, "stopping_criteria": [*options.get("stopping_criteria", []), criterion]}
    options.pop("tokenizer", None)
    try:
        for name, kind in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
            if name in options:
                options[name] = kind(options[name])
        hand_over = functools.partial(handed_over, model, own)
        return model.backbone.generate(**options, custom_generate=hand_over)  # type: ignore[operator]
    except MedusaError:
        raise
    except Exception as error:  # nothing is decoded here, so any error is about the arguments
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InvalidInput(f"transformers cannot prepare this {method}(): {reason}") from error


def _setting(model: Preparable, options: dict[str, Any], key: str) -> Any:
    """A key's value in the call, else in its generation config, else in the backbone's."""
    configs = options.get("generation_config"), model.backbone.generation_config
    found = (options.get(key), *(getattr(config, key, None) for config in configs))
    return next((value for value in found if value is not None), None)


def _defaults(model: Preparable, options: dict[str, Any]) -> dict[str, Any]:
    """Our defaults for what a call leaves open; its settings are checked first."""
    setting, defaults = functools.partial(_setting, model, options), {}
    check_sampling(**{key: options.get(key) for key in (*SAMPLING_KEYS[:4], "repetition_penalty")})
    if setting("do_sample"):
        if setting("top_k") is None:
            defaults["top_k"] = 0
    elif any(key in options for key in SAMPLING_KEYS):
        given = ", ".join(key for key in SAMPLING_KEYS if key in options)
        warnings.warn(f"{given} and their like do nothing without do_sample=True", stacklevel=5)
    if setting("exponential_decay_length_penalty") is not None and setting("eos_token_id") is None:
        raise InvalidInput("exponential_decay_length_penalty needs an eos, and there is none; pass eos_token_id")
    for key in ("cache_implementation", "token_healing"):  # transformers acts on these before it calls us
        refuse(key, setting(key))
    if setting("max_new_tokens") is None and setting("max_length") is None:
        defaults["max_new_tokens"] = _default_length(options, model.max_length)
    return defaults


def options_of_rows(model: Preparable, method: str, **settings: Any) -> DecodingOptions:
    """Options for rows that decode prompts of any length, one after another, from the settings of `prepare`.

    Raises:
        InvalidInput: as in `prepare`, or a setting counts tokens from the end of one prompt.
    """
    prompt = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    options = prepare(model, method, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **settings}).options
    for process, reads in options.processors.steps:
        if reads == "length":
            raise InvalidInput(
                f"{type(process).__name__} counts from the end of one prompt, and {method} decodes many in a row; unset the "
                "key that adds it in the backbone's generation config, such as min_new_tokens"
            )
    return options


def handed_over(
    model: Preparable,
    own: OwnOptions,
    backbone: PreTrainedModel,
    input_ids: Tensor,  # (B, P) long
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Prepared:
    """The prepared call from what transformers' `generate` passes to a custom loop.

    Raises:
        InvalidInput: a tree cannot follow a setting, processor or model input, which is named.
    """
    refuse_settings(generation_config)
    mask, embeds = _prompt(backbone, input_ids, model_kwargs)
    unseen = 0 if embeds is None else embeds.shape[1] - input_ids.shape[1]
    pads = (mask.shape[1] - mask.long().sum(-1)).tolist() if mask is not None else [0] * len(input_ids)
    eos = [token for c in stopping_criteria if isinstance(c, EosTokenCriteria) for token in token_ids(c.eos_token_id)]
    processors = classify(
        logits_processor,
        input_ids,
        pads,
        model.vocab_size,
        unseen,
        min_length_counts_padding=generation_config.min_new_tokens is not None,
        own=own.processors(tuple(eos)),
    )
    if processors and input_ids.device != model.device:  # transformers has made the processors on the device of the ids
        raise InvalidInput(f"input_ids are on {input_ids.device}, the backbone on {model.device}; move input_ids there")
    pad = (token_ids(generation_config.pad_token_id) or eos or [0])[0]
    criteria = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
    limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
    return Prepared(
        input_ids=input_ids,
        attention_mask=mask,
        embeds=embeds,
        options=DecodingOptions(
            max_new_tokens=min(limits) - input_ids.shape[1],
            do_sample=bool(generation_config.do_sample),
            typical=own.typical,
            processors=replace(processors, unseen=unseen),
            eos_token_ids=tuple(eos),
            stopping_criteria=[_of_seen(c, unseen) for c in criteria],
            seed=int(torch.randint(2**62, ())) if own.seed is None else own.seed,
        ),
        tree=own.tree,
        pad_token_id=pad,
        return_dict=bool(generation_config.return_dict_in_generate),
        compiled=own.compile,
    )


def _default_length(options: dict[str, Any], max_length: int | None) -> int:
    """256 new tokens, or as many as fit the model."""
    if max_length is None:
        return DEFAULT_MAX_NEW_TOKENS
    prompt = options.get("inputs_embeds", options.get("input_ids"))
    mask = options.get("attention_mask")
    longest = int(mask.sum(-1).amax()) if mask is not None else prompt.shape[1] if prompt is not None else 1
    return max(1, min(DEFAULT_MAX_NEW_TOKENS, max_length - longest))


def _stop_strings(given: str | list[str], tokenizer: Any) -> Callable:
    strings = [given] if isinstance(given, str) else list(given)
    if not all(strings):
        raise InvalidInput("a stop string is empty and would end every text at once")
    if tokenizer is None:
        raise InvalidInput("stop_strings needs the tokenizer; pass tokenizer=...")
    return StopStringCriteria(tokenizer, strings)


def _prompt(backbone: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the embeddings that transformers would give the backbone's first pass.

    Raises:
        InvalidInput: there is another input, which is named, or positions do not follow from the mask.
    """
    kwargs = dict(model_kwargs)
    for name in CACHES:
        cache = kwargs.pop(name, None)
        _refuse_filled(name, cache)
        if cache is not None and not getattr(cache, "is_compileable", False):
            kwargs[name] = cache  # for a cache of fixed size, the mask would be made differently
    # The backbone prepares them, since peft, for one, adds its soft prompts there.
    inputs = dict(backbone.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs))  # type: ignore[operator]
    for name in CACHES:
        _refuse_filled(name, inputs.pop(name, None))
    for name in OURS_TO_SAY:
        inputs.pop(name, None)
    ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    mask, positions = inputs.pop("attention_mask", None), inputs.pop("position_ids", None)
    for name, value in inputs.items():
        if value is not None and value is not False:
            raise InvalidInput(f"{name} is an input of the model that a tree cannot follow; leave {name} out")
    length = (embeds if embeds is not None else ids).shape[1]
    if (embeds is None and length != input_ids.shape[1]) or length < input_ids.shape[1]:
        raise InvalidInput(
            f"the model takes {length} of the prompt's {input_ids.shape[1]} tokens, expected all; leave out inputs_embeds "
            "that are shorter than input_ids, and caches"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (len(input_ids), length)):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidInput(f"attention_mask is {shape}, expected one of {len(input_ids)} rows and {length} tokens")
    if positions is not None:
        there = torch.ones(len(input_ids), length, device=positions.device) if mask is None else mask.to(positions.device)
        usual = there.long().cumsum(-1) - 1
        if positions.shape[-1] != length or not ((positions == usual) | (there == 0)).all():
            raise InvalidInput("position_ids differ from those that follow from attention_mask; leave position_ids out")
    return mask, embeds


def _of_seen(criterion: StoppingCriterion, unseen: int) -> StoppingCriterion:
    """A criterion that does not see the slots of a soft prompt."""
    return criterion if not unseen else lambda ids, scores: criterion(ids[:, unseen:], scores)


def _refuse_filled(name: str, cache: Any) -> None:
    if cache is None:
        return
    filled = cache.get_seq_length() > 0 if hasattr(cache, "get_seq_length") else True
    if filled or getattr(cache, "_is_user_defined", False):
        raise InvalidInput(f"{name} holds tokens or is to be kept, but Medusa uses its own cache; leave {name} out")
