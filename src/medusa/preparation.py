"""Preparation: what transformers' `generate` makes of a call's arguments, and which of it a tree of candidates can follow."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMixin
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from medusa.acceptance import TypicalAcceptance
from medusa.backbone.backbone import token_ids
from medusa.backbone.processors import check_sampling, classify
from medusa.config import integer
from medusa.decoding import Decodable, DecodingOptions, DecodingStep, StoppingCriterion, decode
from medusa.errors import InvalidInput, MedusaError, UnexpectedKeyword
from medusa.trees.files import Tree

DEFAULT_MAX_NEW_TOKENS = 256

# Every key of transformers' GenerationConfig is one of three things here; a test fails for a key that is none of them.
# fmt: off
# Followed: transformers makes lengths, special tokens, processors and criteria of them, and we take those.
FOLLOWED = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample", "temperature",
    "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "watermarking_config", "num_return_sequences", "return_dict_in_generate", "pad_token_id",
    "bos_token_id", "eos_token_id",
})
# Without effect: of beams, assistants and encoders that are not there (transformers does not look at them then either), or how
# transformers would hold and compile what is held and compiled otherwise here, which no token depends on.
WITHOUT_EFFECT = frozenset({
    "early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups", "decoder_start_token_id", "low_memory",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_cache",
    "cache_config", "max_cache_len", "compile_config", "disable_compile", "continuous_batching_config",
    "prefill_chunk_size", "transformers_version",
})
# fmt: on
# Refused but for the values that leave them off.
ONE_SEQUENCE = "Medusa decodes greedily or by sampling, one sequence a row"
OWN_DRAFTS = "Medusa's heads draft"
OTHER_LOGITS = "it mixes the logits of other passes or layers into the backbone's"
ENCODER = "it looks at the prompts of all rows at once"
NOT_KEPT = "under Medusa a step has many tokens, of which most are dropped"
REFUSED: dict[str, tuple[tuple, str]] = {
    "num_beams": ((1,), ONE_SEQUENCE),
    "constraints": ((), ONE_SEQUENCE),
    "force_words_ids": ((), ONE_SEQUENCE),
    "penalty_alpha": ((0,), ONE_SEQUENCE),
    "dola_layers": ((), OTHER_LOGITS),
    "guidance_scale": ((1,), OTHER_LOGITS),
    "encoder_repetition_penalty": ((1,), ENCODER),
    "encoder_no_repeat_ngram_size": ((0,), ENCODER),
    "use_mtp": ((False,), OWN_DRAFTS),
    "prompt_lookup_num_tokens": ((), OWN_DRAFTS),
    "assistant_early_exit": ((), OWN_DRAFTS),
    "is_assistant": ((False,), OWN_DRAFTS),
    "token_healing": ((False,), "transformers hands no tokenizer on"),
    # Ours is preallocated and holds keys and values as they are.
    "cache_implementation": (
        ("dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked"),
        "a tree is verified in a cache of our own, which is neither offloaded nor quantised nor paged",
    ),
    "output_scores": ((False,), NOT_KEPT),
    "output_logits": ((False,), NOT_KEPT),
    "output_attentions": ((False,), NOT_KEPT),
    "output_hidden_states": ((False,), NOT_KEPT),
}
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Arguments of transformers' `generate` that are no setting and that we pass on, or take ourselves.
ARGUMENTS = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "tokenizer")
# Of a pass over the prompt, what has no influence on its last hidden state, or is ours to say.
CACHES = ("past_key_values", "cache", "cache_params")
OURS_TO_SAY = ("use_cache", "return_dict", "logits_to_keep", "num_logits_to_keep", "cache_position")


@dataclass(frozen=True)
class OwnOptions:
    """The keywords of a call that are Medusa's own; see `MedusaModel.generate`."""

    acceptance: str = "exact"
    epsilon: float = TypicalAcceptance.epsilon
    delta: float = TypicalAcceptance.delta
    seed: int | None = None
    tree: Tree | None = None
    compile: bool = False

    def __post_init__(self):
        if self.acceptance not in ("exact", "typical"):
            raise InvalidInput(f"acceptance is {self.acceptance!r}, wanted 'exact' or 'typical'")
        for name in ("epsilon", "delta"):
            if self.acceptance == "exact" and getattr(self, name) != getattr(TypicalAcceptance, name):
                raise InvalidInput(f"{name} is of typical acceptance; pass acceptance='typical' or leave {name} out")
        if self.seed is not None:
            integer("seed", self.seed)
        if self.tree is not None and not isinstance(self.tree, Tree):
            raise InvalidInput(
                f"tree is a {type(self.tree).__name__}, wanted a MedusaTree or DynamicTree; load a file with load_tree"
            )

    @property
    def typical(self) -> TypicalAcceptance | None:
        """The thresholds of typical acceptance; None is exact."""
        return TypicalAcceptance(self.epsilon, self.delta) if self.acceptance == "typical" else None


OWN = frozenset(OwnOptions.__dataclass_fields__)


@dataclass(frozen=True)
class Prepared:
    """A call prepared: all that the loop needs of it, and what its output needs besides."""

    input_ids: Tensor  # (B, P) long: what the output begins with
    attention_mask: Tensor | None  # (B, P), or (B, L)
    embeds: Tensor | None  # (B, L, d), L >= P: a soft prompt, read in the place of the ids
    options: DecodingOptions
    tree: Tree | None  # None: the model's own
    pad_token_id: int  # fills rows that finished early
    return_dict: bool
    compiled: bool  # run the steps through torch.compile

    def decode(self, model: Any) -> Iterator[DecodingStep]:
        """The steps of this call on a `MedusaModel`; refused now, if at all."""
        tree, ids = model.tree if self.tree is None else self.tree, self.input_ids
        if self.compiled:
            model = model.compiled
        if self.embeds is not None:  # a token for every slot; no one reads those of the unseen
            ids = torch.nn.functional.pad(ids, (self.embeds.shape[1] - ids.shape[1], 0))
            model = _Reading(model, self.embeds)
        return decode(model, ids, self.attention_mask, tree, self.options)


class _Reading:
    """A model as the loop sees it, that reads embeddings in the place of the prompt's tokens."""

    def __init__(self, model: Any, embeds: Tensor):
        self._model, self._embeds = model, embeds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prefill(self, ids: Tensor, attention_mask: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
        return self._model.prefill(ids, attention_mask, cache, self._embeds.to(ids.device))


class Preparable(Decodable, Protocol):
    """What preparing needs of a model; `MedusaModel` is one."""

    backbone: PreTrainedModel


def prepare(
    model: Preparable,
    method: str,  # the one that was called, for errors
    options: dict[str, Any],
) -> Prepared:
    """A call of ours: transformers' own `generate` prepares it and hands it to `handed_over`.

    Two departures: a top-k of 50 that nobody asked for is not applied, and without a length there are 256 new tokens.

    Args:
        options: the call's keywords, `input_ids` and `attention_mask` among them; None is not given.

    Raises:
        InvalidInput: what cannot be followed, by name; what transformers refuses.
    """
    options = {name: value for name, value in options.items() if value is not None}
    # numpy's numbers are numbers, but neither int nor float, which transformers asks for.
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    own = OwnOptions(**{name: options.pop(name) for name in OWN & options.keys()})
    _check_names(model.backbone, method, options)
    config, theirs = options.get("generation_config"), model.backbone.generation_config
    defaults: dict[str, Any] = {}

    def setting(key: str) -> Any:
        """What the call says of a key, else its generation config, else the backbone's."""
        found = (options.get(key), getattr(config, key, None), getattr(theirs, key, None))
        return next((value for value in found if value is not None), None)

    check_sampling(**{key: options.get(key) for key in (*SAMPLING_KEYS[:4], "repetition_penalty")})
    if setting("do_sample"):
        if setting("top_k") is None:
            defaults["top_k"] = 0
    elif any(key in options for key in SAMPLING_KEYS):
        given = ", ".join(key for key in SAMPLING_KEYS if key in options)
        warnings.warn(f"{given} and their like do nothing without do_sample=True", stacklevel=4)
    if setting("exponential_decay_length_penalty") is not None and setting("eos_token_id") is None:
        raise InvalidInput("exponential_decay_length_penalty makes the eos likelier, and there is none; pass eos_token_id")
    for key in ("cache_implementation", "token_healing"):  # transformers acts on these before it hands over
        _refuse(key, setting(key))
    if setting("max_new_tokens") is None and setting("max_length") is None:
        defaults["max_new_tokens"] = _default_length(options, model.context)
    if config is not None:  # transformers takes a config or keywords
        options["generation_config"] = copy.deepcopy(config)
        options["generation_config"].update(**defaults)
    else:
        options |= defaults
    if "max_new_tokens" in options:
        options["max_new_tokens"] = integer("max_new_tokens", options["max_new_tokens"], least=1)
    if isinstance(eos := options.get("eos_token_id"), list | tuple | Tensor) and len(token_ids(eos)) == 0:
        options["eos_token_id"] = None  # so transformers spells "none"
    if (strings := setting("stop_strings")) is not None:
        # transformers drops the tokenizer on the way to a custom loop, so the criterion is made here.
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
    except Exception as error:  # nothing is decoded here: whatever it is, it is about what was given
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InvalidInput(f"transformers cannot prepare this {method}(): {reason}") from error


def options_of_rows(model: Preparable, method: str, **settings: Any) -> DecodingOptions:
    """What `prepare` makes of settings for rows that hold prompts of any length, one after another.

    Raises:
        InvalidInput: as there, and where the generation config counts from the end of one prompt.
    """
    prompt = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    options = prepare(model, method, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **settings}).options
    for process, reads in options.processors.steps:
        if reads == "length":
            raise InvalidInput(
                f"{type(process).__name__} counts from the end of one prompt, and {method} decodes many in a row; unset what "
                "asks for it in the backbone's generation config, such as min_new_tokens"
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
    """What transformers' `generate` has prepared, in the words of a custom loop.

    Raises:
        InvalidInput: a setting, processor or model input that a tree cannot follow, by name.
    """
    refuse_settings(generation_config)
    mask, embeds = _prompt(backbone, input_ids, model_kwargs)
    unseen = 0 if embeds is None else embeds.shape[1] - input_ids.shape[1]
    pads = (mask.shape[1] - mask.long().sum(-1)).tolist() if mask is not None else [0] * len(input_ids)
    processors = classify(
        logits_processor,
        input_ids,
        pads,
        model.vocab_size,
        unseen,
        min_length_counts_padding=generation_config.min_new_tokens is not None,
    )
    if processors and input_ids.device != model.device:  # transformers has made the processors where the ids are
        raise InvalidInput(f"input_ids are on {input_ids.device}, the backbone on {model.device}; move input_ids there")
    eos = [token for c in stopping_criteria if isinstance(c, EosTokenCriteria) for token in token_ids(c.eos_token_id)]
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


def refuse_settings(config: GenerationConfig) -> None:
    """Refuse the settings of a prepared generation config that cannot be followed, by name."""
    defaults = config._get_default_generation_params()
    for key in _config_keys() - FOLLOWED - WITHOUT_EFFECT:
        value = getattr(config, key, None)
        if key in REFUSED:
            _refuse(key, value)
        elif value is not None and value != defaults.get(key):
            raise InvalidInput(f"{key} is a setting of a newer transformers that nobody has tried with Medusa; unset {key}")


def _refuse(key: str, value: Any) -> None:
    off, why = REFUSED[key]
    if value is not None and value not in off:
        raise InvalidInput(f"{key} is {value!r}, which Medusa cannot follow: {why}; unset {key}")


@functools.cache
def _config_keys() -> frozenset[str]:
    return frozenset(key for key in vars(GenerationConfig()) if not key.startswith("_"))


def _check_names(backbone: PreTrainedModel, method: str, options: dict[str, Any]) -> None:
    """Refuse keywords that nobody knows, and arguments of transformers' `generate` that cannot be followed."""
    inputs: set[str] = set()
    for function in (backbone.forward, backbone.prepare_inputs_for_generation):  # type: ignore[operator]
        inputs |= inspect.signature(function).parameters.keys()
    others = inspect.signature(GenerationMixin.generate).parameters.keys() - {"self", "kwargs"}
    others |= {"assistant_tokenizer", "trust_remote_code"}
    known = {"input_ids", "attention_mask", *ARGUMENTS, *_config_keys(), *inputs} - {"self", "kwargs", "labels"}
    for name, value in options.items():
        if name in known:
            continue
        if name not in others:
            near = difflib.get_close_matches(name, [*known, *OWN], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnexpectedKeyword(f"{method}() got an unexpected keyword {name!r}{hint}")
        if value is not False:
            raise InvalidInput(f"{name} cannot be followed by Medusa; leave it out, or call the backbone's own generate")


def _default_length(options: dict[str, Any], context: int | None) -> int:
    """256 new tokens, or what the context leaves."""
    if context is None:
        return DEFAULT_MAX_NEW_TOKENS
    prompt = options.get("inputs_embeds", options.get("input_ids"))
    mask = options.get("attention_mask")
    longest = int(mask.sum(-1).amax()) if mask is not None else prompt.shape[1] if prompt is not None else 1
    return max(1, min(DEFAULT_MAX_NEW_TOKENS, context - longest))


def _stop_strings(given: str | list[str], tokenizer: Any) -> Callable:
    strings = [given] if isinstance(given, str) else list(given)
    if not all(strings):
        raise InvalidInput("a stop string is empty and would end every text at once")
    if tokenizer is None:
        raise InvalidInput("stop_strings needs the tokenizer; pass tokenizer=...")
    return StopStringCriteria(tokenizer, strings)


def _prompt(backbone: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """What transformers would give the backbone's first pass, but for its ids and its cache: a mask, and embeddings.

    Raises:
        InvalidInput: any other input, by name, and positions other than those that follow from the mask.
    """
    kwargs = dict(model_kwargs)
    for name in CACHES:
        cache = kwargs.pop(name, None)
        _refuse_filled(name, cache)
        if cache is not None and not getattr(cache, "is_compileable", False):
            kwargs[name] = cache  # one of fixed size would have the mask made for it
    # Asked and not read off the keywords: peft, say, puts its soft prompts in here.
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
            f"the model takes {length} of the prompt's {input_ids.shape[1]} tokens, wanted all; leave out inputs_embeds "
            "that are shorter than input_ids, and caches"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (len(input_ids), length)):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidInput(f"attention_mask is {shape}, wanted one of {len(input_ids)} rows and {length} tokens")
    if positions is not None:
        there = torch.ones(len(input_ids), length, device=positions.device) if mask is None else mask.to(positions.device)
        usual = there.long().cumsum(-1) - 1
        if positions.shape[-1] != length or not ((positions == usual) | (there == 0)).all():
            raise InvalidInput("position_ids are not those of the attention_mask, which Medusa goes by; leave position_ids out")
    return mask, embeds


def _of_seen(criterion: StoppingCriterion, unseen: int) -> StoppingCriterion:
    """A criterion that does not see the slots of a soft prompt that stand for no token."""
    return criterion if not unseen else lambda ids, scores: criterion(ids[:, unseen:], scores)


def _refuse_filled(name: str, cache: Any) -> None:
    if cache is None:
        return
    filled = cache.get_seq_length() > 0 if hasattr(cache, "get_seq_length") else True
    if filled or getattr(cache, "_is_user_defined", False):
        raise InvalidInput(f"{name} holds tokens or is yours to keep, and Medusa has a cache of its own; leave {name} out")
