"""Settings: which keys and arguments of transformers' `generate` Medusa follows, and which it refuses."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Collection
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from medusa.errors import InvalidInput, UnexpectedKeyword

# Every key of transformers' GenerationConfig is in one of three lists; a test fails for a key in none of them.
# fmt: off
# Followed: transformers turns them into lengths, special tokens, processors and criteria, which the loop takes.
FOLLOWED = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample", "temperature",
    "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "watermarking_config", "num_return_sequences", "return_dict_in_generate", "pad_token_id",
    "bos_token_id", "eos_token_id",
})
# Without effect: settings of beams, assistants and encoders that are not used here (transformers ignores them then too), and of
# transformers' own caches and compilation, on which no token depends.
WITHOUT_EFFECT = frozenset({
    "early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups", "decoder_start_token_id", "low_memory",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_cache",
    "cache_config", "max_cache_len", "compile_config", "disable_compile", "continuous_batching_config",
    "prefill_chunk_size", "transformers_version",
})
# fmt: on
# Refused, except for the values that switch them off.
ONE_SEQUENCE = "Medusa decodes greedily or by sampling, one sequence per row"
OWN_DRAFTS = "Medusa's heads draft"
OTHER_LOGITS = "it mixes the logits of other passes or layers into the backbone's"
ENCODER = "it reads the prompts of all rows at once"
NOT_KEPT = "a step of Medusa has many tokens, most of which are dropped"
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
    "token_healing": ((False,), "transformers does not pass on the tokenizer"),
    # Ours is preallocated and holds unchanged keys and values.
    "cache_implementation": (
        ("dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked"),
        "a tree is verified in Medusa's own cache, which is neither offloaded nor quantised nor paged",
    ),
    "output_scores": ((False,), NOT_KEPT),
    "output_logits": ((False,), NOT_KEPT),
    "output_attentions": ((False,), NOT_KEPT),
    "output_hidden_states": ((False,), NOT_KEPT),
}
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Arguments of transformers' `generate` that are not settings, which we pass on or use ourselves.
ARGUMENTS = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "tokenizer")


def refuse_settings(config: GenerationConfig) -> None:
    """Refuse the settings of a prepared generation config that Medusa cannot follow; the error names the setting."""
    defaults = config._get_default_generation_params()
    for key in _config_keys() - FOLLOWED - WITHOUT_EFFECT:
        value = getattr(config, key, None)
        if key in REFUSED:
            refuse(key, value)
        elif value is not None and value != defaults.get(key):
            raise InvalidInput(f"{key} is a setting of a newer transformers that has not been tried with Medusa; unset {key}")


def refuse(key: str, value: Any) -> None:
    off, why = REFUSED[key]
    if value is not None and value not in off:
        raise InvalidInput(f"{key} is {value!r}, which Medusa cannot follow: {why}; unset {key}")


@functools.cache
def _config_keys() -> frozenset[str]:
    return frozenset(key for key in vars(GenerationConfig()) if not key.startswith("_"))


def check_names(backbone: PreTrainedModel, method: str, options: dict[str, Any], own: Collection[str]) -> None:
    """Refuse unknown keywords, and arguments of transformers' `generate` that Medusa cannot follow."""
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
            near = difflib.get_close_matches(name, [*known, *own], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnexpectedKeyword(f"{method}() got an unexpected keyword {name!r}{hint}")
        if value is not False:
            raise InvalidInput(f"{name} cannot be followed by Medusa; leave it out, or call the backbone's own generate")
