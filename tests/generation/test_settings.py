"""Claims about settings: every key of a generation config gives transformers' own tokens, or is refused by its name."""

import copy
import itertools

import pytest
import torch
from transformers import GenerationConfig

import medusa.batch.state
from medusa import MedusaModel
from medusa.errors import InvalidInput
from medusa.generation.settings import FOLLOWED, REFUSED, WITHOUT_EFFECT
from medusa.sampling import draw, position_keys
from tiny import left_padded, plain_greedy, random_heads, random_prompt, random_tree, tiny_backbone

NEW = 6
PROMPTS = [random_prompt(9), random_prompt(4, seed=1)]
RAGGED = left_padded(PROMPTS)
WATERMARK = {"bias": 4.0, "greenlist_ratio": 0.5}

# A value of every key that does something where anything does. What transformers gives for it is the test's to find out.
EXAMPLES = {
    "max_length": 13,
    "max_new_tokens": 4,
    "min_length": 12,
    "min_new_tokens": 5,
    "early_stopping": True,
    "max_time": 100.0,
    "stop_strings": ["e"],
    "do_sample": True,
    "num_beams": 2,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "offloaded",
    "cache_config": {"nbits": 4},
    "max_cache_len": 64,
    "temperature": 0.6,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.3,
    "top_h": 0.4,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 1.8,
    "encoder_repetition_penalty": 1.5,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[35], [27, 1]],
    "renormalize_logits": True,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 11,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 1.8),
    "suppress_tokens": [35, 27, 1],
    "begin_suppress_tokens": [35, 27, 1],
    "sequence_bias": [[[35], -9.0], [[1], 3.0]],
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": WATERMARK,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 7,
    "bos_token_id": 8,
    "eos_token_id": [12, 35],
    "encoder_no_repeat_ngram_size": 2,
    "decoder_start_token_id": 6,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.7,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 3,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "compile_config": None,  # only where there is a GPU
    "disable_compile": True,
    "continuous_batching_config": None,  # transformers itself says that it is going
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": ["some"],
    "force_words_ids": [[5]],
    "prefill_chunk_size": 4,
    "transformers_version": "5.17.0",
}
KEYS = sorted(key for key in vars(GenerationConfig()) if not key.startswith("_"))


@pytest.fixture(scope="module")
def model() -> MedusaModel:
    backbone = tiny_backbone(num_hidden_layers=1)
    return MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=40))


@pytest.fixture(scope="module")
def eos(model) -> int:
    """A token that the model comes to by itself."""
    return plain_greedy(model.backbone, PROMPTS[0], NEW)[3]


@pytest.fixture
def row_keys(monkeypatch):
    """The keys of the rows of Medusa's last requests; transformers can draw by them too."""
    found: list[torch.Tensor] = []
    row_keys = medusa.batch.state.row_keys

    def noted(*args, **kwargs):
        found.append(row_keys(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(medusa.batch.state, "row_keys", noted)
    return found


def transformers_draws(monkeypatch, keys: torch.Tensor) -> None:
    """Have transformers draw by these keys, (rows,)."""
    steps = itertools.count()

    def multinomial(p, num_samples):
        return draw(p.log()[:, None], position_keys(keys, torch.tensor(next(steps)))[:, None])

    monkeypatch.setattr(torch, "multinomial", multinomial)


def test_every_key_is_followed_or_without_effect_or_refused():
    assert len(KEYS) >= 45
    for key in KEYS:  # a key that a newer transformers has: decide which of the three it is, and give an example
        assert [key in FOLLOWED, key in WITHOUT_EFFECT, key in REFUSED].count(True) == 1, key
        assert key in EXAMPLES, key


@pytest.mark.parametrize("key", [key for key in KEYS if key not in REFUSED])
@pytest.mark.parametrize("rows", ["one", "ragged"])
def test_setting_gives_transformers_own_tokens(model, eos, embedded_tokenizer, row_keys, monkeypatch, key, rows):
    ids, mask = RAGGED if rows == "ragged" else (PROMPTS[0], torch.ones_like(PROMPTS[0]))
    extra = {"tokenizer": embedded_tokenizer} if key == "stop_strings" else {}
    for ends, pad in ((None, None), (eos, None), (eos, 0)) if key in FOLLOWED else ((eos, 0),):
        for sampled in (False, True):
            own = {"eos_token_id": ends, "pad_token_id": pad, "do_sample": sampled, "top_k": 50, key: EXAMPLES[key]}
            if key != "max_length":
                own.setdefault("max_new_tokens", NEW)
            if key == "num_return_sequences" and not sampled:
                continue  # transformers has several only of draws
            config = GenerationConfig(**own)
            sampled = bool(config.do_sample)
            if key == "exponential_decay_length_penalty" and ends is None:  # transformers fails, and does not say why
                with pytest.raises(InvalidInput, match=key):
                    model.generate(ids, mask, generation_config=config)
                continue

            torch.manual_seed(5)
            direct = tokens(model.generate(ids, mask, generation_config=config, **extra))
            torch.manual_seed(5)
            custom = {"attention_mask": mask, "generation_config": config, "custom_generate": model.custom_generate}
            if key == "stop_strings":  # transformers keeps the tokenizer from custom loops
                with pytest.raises(ValueError, match="stop strings"):
                    model.backbone.generate(ids, **custom, **extra)
            else:
                assert torch.equal(tokens(model.backbone.generate(ids, **custom)), direct)

            with monkeypatch.context() as patch:
                # What transformers counts or punishes in a padded batch includes the padding, so there each row is asked alone.
                if rows == "one" or key in ("max_length", "num_return_sequences"):
                    if sampled:
                        transformers_draws(patch, row_keys[-1])
                    wanted = model.backbone.generate(ids, attention_mask=mask, generation_config=config, **extra)
                    assert_same_rows(direct, tokens(wanted), ids.shape[1], config)
                    continue
                for row, prompt in enumerate(PROMPTS):
                    if sampled:
                        transformers_draws(patch, row_keys[-1][row : row + 1])
                    alone = model.backbone.generate(
                        prompt, attention_mask=torch.ones_like(prompt), generation_config=config, **extra
                    )
                    alone = tokens(alone)[:, prompt.shape[1] :]
                    assert_same_rows(direct[row : row + 1, ids.shape[1] :], alone, 0, config)


def tokens(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sequences


def assert_same_rows(got: torch.Tensor, wanted: torch.Tensor, start: int, config: GenerationConfig) -> None:
    """The same prompt and tokens, and behind the shorter nothing but what fills rows that ended early."""
    width = min(got.shape[1], wanted.shape[1])
    assert got[:, :width].tolist() == wanted[:, :width].tolist()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert got.shape[1] >= width
    assert set(got[:, width:].flatten().tolist()) <= {config.pad_token_id, *ends, 0}
    assert wanted.shape[1] == width and start <= width


@pytest.mark.parametrize("key", [key for key in KEYS if key in REFUSED])
def test_setting_that_a_tree_cannot_follow_is_refused_by_name(model, key):
    mask = torch.ones_like(PROMPTS[0])
    config = GenerationConfig(max_new_tokens=2, pad_token_id=0, **{key: EXAMPLES[key]})
    for settings in ({key: EXAMPLES[key]}, {"generation_config": config}):
        with pytest.raises(InvalidInput, match=key):
            model.generate(PROMPTS[0], mask, **settings)
    with pytest.raises(ValueError, match=f"(?i){key}|{key.replace('_', ' ')}"):
        model.backbone.generate(
            PROMPTS[0], attention_mask=mask, generation_config=config, custom_generate=model.custom_generate
        )


@pytest.mark.parametrize("key", [key for key in KEYS if EXAMPLES[key] is not None])
def test_key_of_the_backbones_own_config_is_read_as_if_it_were_given(model, embedded_tokenizer, monkeypatch, key):
    backbone, prompt = model.backbone, PROMPTS[0]
    # Several sequences are only of draws, and an eos has to be there to be made likelier.
    rest = {"do_sample": key == "num_return_sequences", "eos_token_id": 12, "max_new_tokens": NEW} | {key: EXAMPLES[key]}
    if key == "max_length":
        del rest["max_new_tokens"]
    value = rest.pop(key)
    if key == "stop_strings":
        rest["tokenizer"] = embedded_tokenizer
    theirs = copy.deepcopy(backbone.generation_config)
    theirs.update(**{key: value, "do_sample": value if key == "do_sample" else rest["do_sample"]})
    outcomes = []
    for config, given in ((theirs, rest), (backbone.generation_config, rest | {key: value})):
        with monkeypatch.context() as patch:
            patch.setattr(backbone, "generation_config", config)
            torch.manual_seed(3)
            try:
                outcomes.append(tokens(model.generate(prompt, torch.ones_like(prompt), **given)).tolist())
            except InvalidInput as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert (key in REFUSED) == isinstance(outcomes[0], str)
