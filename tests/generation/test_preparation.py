"""Claims about preparing a call: arguments mean what they mean in transformers, and none is dropped without a word."""

import inspect

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMixin, MaxLengthCriteria

from medusa import MedusaModel, MedusaTree
from medusa.backbone.lm import TreeLM
from medusa.errors import InvalidInput, MedusaError, UnexpectedKeyword
from medusa.generation.settings import ARGUMENTS
from tiny import left_padded, plain_greedy, random_heads, random_prompt, random_tree, tiny_backbone

PROMPT = random_prompt(7)
MASK = torch.ones_like(PROMPT)


def through_transformers(model, ids=None, **options):
    return model.backbone.generate(ids, custom_generate=model.custom_generate, **options)


def embedded(backbone, ids, noise=1.0):
    """Embeddings near those of the ids."""
    embeds = backbone.get_input_embeddings()(ids).detach()
    return embeds + noise * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(2))


# What is passed, and how it is named where it is refused.


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_unknown_keyword_is_named_with_the_method_and_the_nearest(tiny_model, method):
    with pytest.raises(
        UnexpectedKeyword, match=rf"^{method}\(\) got an unexpected keyword 'temprature'; did you mean 'temperature'"
    ):
        getattr(tiny_model, method)(PROMPT, temprature=1.0)
    assert issubclass(UnexpectedKeyword, TypeError) and issubclass(UnexpectedKeyword, MedusaError)
    with pytest.raises(ValueError, match="temprature"):
        through_transformers(tiny_model, PROMPT, attention_mask=MASK, temprature=1.0)


OTHERS = sorted(inspect.signature(GenerationMixin.generate).parameters.keys() - {"self", "kwargs", *ARGUMENTS})


@pytest.mark.parametrize("name", [*OTHERS, "assistant_tokenizer", "trust_remote_code"])
def test_argument_of_generate_that_is_not_followed_is_refused_by_name(tiny_model, name):
    if name == "streamer":
        with pytest.raises(InvalidInput, match=r"^streamer"):
            tiny_model.stream(PROMPT, streamer=object())
        return
    with pytest.raises(InvalidInput, match=f"^{name}"):
        tiny_model.generate(PROMPT, MASK, max_new_tokens=2, **{name: object()})


@pytest.mark.parametrize("name", ["token_type_ids", "past_key_values", "position_ids"])
def test_model_input_that_a_tree_cannot_follow_is_refused_by_name(name):
    from transformers import DynamicCache

    backbone = tiny_backbone("gpt2")
    model = MedusaModel(backbone)
    cache = DynamicCache(config=backbone.config)
    given = {"token_type_ids": torch.ones_like(PROMPT), "past_key_values": cache, "position_ids": torch.arange(3, 10)[None]}
    for generate in (model.generate, lambda ids, **options: through_transformers(model, ids, **options)):
        with pytest.raises(InvalidInput, match=name):
            generate(PROMPT, attention_mask=MASK, max_new_tokens=2, **{name: given[name]})


def test_position_ids_that_follow_from_the_mask_are_taken(tiny_model):
    ids, mask = left_padded([random_prompt(9), random_prompt(4, seed=1)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = tiny_model.generate(ids, mask, max_new_tokens=8)
    assert torch.equal(tiny_model.generate(ids, mask, max_new_tokens=8, position_ids=positions), wanted)


def test_setting_of_a_newer_transformers_is_refused_until_someone_decides(tiny_model, monkeypatch):
    from medusa.generation import settings

    keys = settings._config_keys()
    monkeypatch.setattr(settings, "_config_keys", lambda: keys | {"braid_size"})
    config = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    assert tiny_model.generate(PROMPT, generation_config=config).shape == (1, 9)
    config.braid_size = 3
    with pytest.raises(InvalidInput, match="braid_size"):
        tiny_model.generate(PROMPT, generation_config=config)


def test_epsilon_without_typical_acceptance_is_refused(tiny_model):
    with pytest.raises(InvalidInput, match=r"^epsilon"):
        tiny_model.generate(PROMPT, do_sample=True, epsilon=0.2)


# Lengths, ids and masks.


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_numbers_of_other_libraries_are_numbers(tiny_model, kind):
    assert tiny_model.generate(PROMPT, MASK, max_new_tokens=kind(4)).shape == (1, 11)
    if kind is not torch.tensor:
        options = {"do_sample": True, "max_new_tokens": 4}
        wanted = tiny_model.generate(PROMPT, MASK, top_k=3, temperature=0.5, seed=5, **options)
        numpys = {"top_k": kind(3), "temperature": np.float32(0.5), "seed": kind(5)}
        assert torch.equal(tiny_model.generate(PROMPT, MASK, **numpys, **options), wanted)


def test_max_length_below_the_prompt_is_said_so(tiny_model):
    with pytest.raises(InvalidInput, match=r"generate\(\).* is 7, but `max_length` is set to 5") as error:
        tiny_model.generate(PROMPT, MASK, max_length=5)
    assert "\n" not in str(error.value)


def test_model_without_eos_and_pad_decodes():
    backbone = tiny_backbone()
    backbone.generation_config.eos_token_id = backbone.generation_config.pad_token_id = None
    model = MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=40))
    wanted = backbone.generate(PROMPT, attention_mask=MASK, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=12), wanted)


def test_padding_without_a_mask_is_told_by_the_pad_id_as_transformers_does(tiny_model):
    ids, mask = left_padded([random_prompt(9), random_prompt(4, seed=1)])
    wanted = tiny_model.backbone.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(tiny_model.generate(ids, max_new_tokens=8), wanted)
    assert torch.equal(wanted, tiny_model.generate(ids, mask, max_new_tokens=8))


def test_text_begins_with_the_bos_where_there_is_no_prompt(tiny_model):
    wanted = tiny_model.backbone.generate(max_new_tokens=8, do_sample=False)
    assert torch.equal(tiny_model.generate(max_new_tokens=8), wanted)
    assert torch.equal(tiny_model.generate(inputs=wanted[:, :1], max_new_tokens=8), wanted)


def test_empty_list_of_eos_means_none(tiny_model):
    eos = plain_greedy(tiny_model.backbone, PROMPT, 8)[3]
    assert tiny_model.generate(PROMPT, MASK, max_new_tokens=8, eos_token_id=eos).shape[1] < 15
    config = GenerationConfig(max_new_tokens=8, eos_token_id=eos, pad_token_id=0)
    assert tiny_model.generate(PROMPT, MASK, generation_config=config, eos_token_id=[]).shape[1] == 15


def test_ones_own_maximum_length_is_a_criterion_like_any(tiny_model):
    criteria = StoppingCriteriaList([MaxLengthCriteria(12)])
    assert tiny_model.generate(PROMPT, MASK, max_new_tokens=8, stopping_criteria=criteria).shape == (1, 12)


def test_do_sample_of_the_generation_config_is_followed(monkeypatch):
    backbone = tiny_backbone()
    model = MedusaModel(backbone)
    wanted = model.generate(PROMPT, MASK, max_new_tokens=12, do_sample=True, temperature=2.0, seed=3)
    backbone.generation_config.update(do_sample=True, temperature=2.0)
    assert torch.equal(model.generate(PROMPT, MASK, max_new_tokens=12, seed=3), wanted)


def test_medusas_own_keywords_pass_through_transformers(tiny_model):
    options = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_k": 0, "seed": 4}
    wanted = tiny_model.generate(PROMPT, **options)
    root = through_transformers(tiny_model, PROMPT, tree=MedusaTree([]), return_dict_in_generate=True, **options)
    assert torch.equal(root.sequences, wanted) and root.steps == 12
    typical = tiny_model.generate(PROMPT, acceptance="typical", epsilon=0.3, **options)
    assert torch.equal(through_transformers(tiny_model, PROMPT, acceptance="typical", epsilon=0.3, **options), typical)


# Soft prompts.


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.8}, {"min_new_tokens": 6, "eos_token_id": list(range(32))}])
@pytest.mark.parametrize("with_ids", ["none", "as many", "fewer"])
def test_soft_prompt_is_read_as_transformers_reads_it(tiny_model, with_ids, settings):
    backbone = tiny_model.backbone
    embeds = embedded(backbone, random_prompt(9))
    ids = {"none": None, "as many": random_prompt(9), "fewer": random_prompt(9)[:, 4:]}[with_ids]
    options = {
        "inputs_embeds": embeds,
        "attention_mask": torch.ones(1, 9),
        "max_new_tokens": 10,
        "do_sample": False,
        **settings,
    }
    if with_ids == "fewer":
        del options["attention_mask"]
        options["position_ids"] = torch.arange(9)[None]  # which transformers would make for the ids
    wanted, start = backbone.generate(ids, **options), 0 if ids is None else ids.shape[1]
    assert torch.equal(tiny_model.generate(ids, **options), wanted)
    assert torch.equal(through_transformers(tiny_model, ids, **options), wanted)
    assert [token for step in tiny_model.stream(ids, **options) for token in step.tokens[0]] == wanted[0, start:].tolist()


def test_ragged_soft_prompts_give_each_row_what_it_gets_alone(tiny_model):
    ids, mask = left_padded([random_prompt(9), random_prompt(4, seed=1)])
    embeds = embedded(tiny_model.backbone, ids)
    options = {"max_new_tokens": 10, "repetition_penalty": 1.8, "do_sample": False}
    batch = tiny_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    for row, start in enumerate((0, 5)):
        alone = tiny_model.backbone.generate(inputs_embeds=embeds[row : row + 1, start:], **options)
        assert batch[row].tolist() == alone[0].tolist()


def test_stopping_criteria_see_no_slots_of_a_soft_prompt(tiny_model):
    seen = []

    def criterion(ids, scores):
        seen.append(ids.tolist())
        return torch.zeros(len(ids), dtype=torch.bool)

    ids, embeds = random_prompt(3), embedded(tiny_model.backbone, random_prompt(9))
    positions = torch.arange(9)[None]
    output = tiny_model.generate(
        ids, inputs_embeds=embeds, position_ids=positions, max_new_tokens=2, stopping_criteria=[criterion]
    )
    assert seen == [output[:, :4].tolist(), output.tolist()]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "LoraConfig"])
def test_peft_models_hand_over_to_medusa(kind):
    peft = pytest.importorskip("peft")
    options = {"num_virtual_tokens": 4} if kind != "LoraConfig" else {"init_lora_weights": False}
    tuned = peft.get_peft_model(tiny_backbone(), getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "prompt_encoder" in name:
                parameter.mul_(5)
    base = tuned.get_base_model()
    model = MedusaModel(base, random_heads(base), random_tree(seed=1, nodes=40))
    settings = {"input_ids": PROMPT, "attention_mask": MASK, "max_new_tokens": 10, "do_sample": False}
    wanted = tuned.generate(**settings)
    if kind == "PrefixTuningConfig":  # keys and values from nowhere
        with pytest.raises(InvalidInput, match=r"^past_key_values"):
            tuned.generate(custom_generate=model.custom_generate, **settings)
        return
    assert torch.equal(tuned.generate(custom_generate=model.custom_generate, **settings), wanted)


# What transformers calls things.


def test_cache_goes_by_the_name_that_the_decoder_gives_it():
    backbone = tiny_backbone()
    before, forward = TreeLM(backbone), backbone.model.forward
    wanted = before.prefill(PROMPT, None, before.new_cache(7))

    def renamed(input_ids, attention_mask, position_ids, cache, use_cache):
        return forward(input_ids, attention_mask, position_ids, past_key_values=cache, use_cache=use_cache)

    backbone.model.forward = renamed
    after = TreeLM(backbone)
    assert torch.equal(after.prefill(PROMPT, None, after.new_cache(7)), wanted)


def test_lists_of_processors_may_be_lists(tiny_model):
    wanted = tiny_model.generate(PROMPT, MASK, max_new_tokens=4, logits_processor=LogitsProcessorList([]))
    assert torch.equal(tiny_model.generate(PROMPT, MASK, max_new_tokens=4, logits_processor=[]), wanted)
