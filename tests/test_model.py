"""Claims about MedusaModel: loading, transformers' conventions, and clear errors on bad input."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, TextIteratorStreamer
from transformers.generation import SynthIDTextWatermarkLogitsProcessor

from medusa import EMBEDDED, MedusaConfig, MedusaModel, MedusaTree
from medusa.errors import CheckpointError, ConfigError, ContextOverflow, InvalidInput, InvalidTree
from tiny import left_padded, plain_greedy, random_heads, random_prompt, random_tree, tiny_backbone


@pytest.fixture
def saved(tmp_path):
    """A backbone folder and a heads folder."""
    backbone = tiny_backbone()
    model = MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=40))
    backbone.save_pretrained(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "heads")
    return tmp_path


def test_save_and_load_round_trip(saved):
    model = MedusaModel.from_pretrained(saved / "backbone", saved / "heads")
    prompt = random_prompt(7)
    assert model.tree == random_tree(seed=1, nodes=40)
    assert model.generate(prompt, max_new_tokens=20)[0, 7:].tolist() == plain_greedy(model.backbone, prompt, 20)


def test_heads_may_lie_in_the_backbones_folder(saved):
    for name in ("medusa_lm_head.safetensors", "medusa_tree.json"):
        shutil.copy(saved / "heads" / name, saved / "backbone" / name)
    model = MedusaModel.from_pretrained(saved / "backbone", tree=MedusaTree([(0,)]))
    assert model.num_heads == 3 and len(model.tree) == 2


def test_dtype_applies_to_backbone_and_heads(saved):
    model = MedusaModel.from_pretrained(saved / "backbone", saved / "heads", dtype=torch.bfloat16)
    assert model.backbone.dtype == next(model.heads.parameters()).dtype == torch.bfloat16


def test_backbone_that_needs_eager_attention_gets_it(tmp_path):
    backbone = tiny_backbone("gemma2", attention="eager", attn_logit_softcapping=2.0, query_pre_attn_scalar=16)
    backbone.save_pretrained(tmp_path / "backbone")
    MedusaModel(backbone, random_heads(backbone)).save_pretrained(tmp_path / "heads")
    model = MedusaModel.from_pretrained(tmp_path / "backbone", tmp_path / "heads")
    prompt = random_prompt(7)
    assert model.generate(prompt, max_new_tokens=10)[0, 7:].tolist() == plain_greedy(backbone, prompt, 10)


def test_folder_without_a_model_is_one_line(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as error:
        MedusaModel.from_pretrained(tmp_path / "empty", saved / "heads")
    assert "\n" not in str(error.value)


def test_unknown_name_is_neither_folder_nor_fetched():
    with pytest.raises(CheckpointError, match="is not a folder here and cannot be fetched"):
        MedusaModel.from_pretrained("nobody/no-such-model")


def test_model_without_heads_decodes_plainly():
    backbone = tiny_backbone()
    model = MedusaModel(backbone)
    prompt = random_prompt(7)
    assert model.generate(prompt, max_new_tokens=10)[0, 7:].tolist() == plain_greedy(backbone, prompt, 10)
    with pytest.raises(InvalidTree, match="needs 1 heads, there are 0"):
        model.generate(prompt, tree=MedusaTree([(0,)]))


def test_tree_deeper_than_the_heads_is_refused_at_load(saved):
    with pytest.raises(InvalidTree, match="needs 4 heads, there are 3"):
        MedusaModel.from_pretrained(saved / "backbone", saved / "heads", tree=MedusaTree.dense([1, 1, 1, 1]))


def test_rank_beyond_the_vocabulary_is_refused(saved):
    with pytest.raises(InvalidTree, match="rank 64, the vocabulary has 64"):
        MedusaModel.from_pretrained(saved / "backbone", saved / "heads", tree=MedusaTree([(64,)]))


def test_loading_leaves_the_backbone_as_it_was():
    backbone = tiny_backbone()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    MedusaModel(backbone, random_heads(backbone)).generate(random_prompt(5), max_new_tokens=10)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("sampled", [False, True])
def test_backbones_generate_hands_over_to_medusa(tiny_model, sampled):
    prompts = [random_prompt(9), random_prompt(4, seed=1)]
    ids, mask = left_padded(prompts)
    options = {"do_sample": True, "top_k": 1, "temperature": 0.7} if sampled else {"do_sample": False}
    eos = plain_greedy(tiny_model.backbone, prompts[0], 20)[12]
    wanted = [plain_greedy(tiny_model.backbone, prompt, 20, eos_token_id=eos) for prompt in prompts]
    output = tiny_model.backbone.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=20,
        eos_token_id=eos,
        pad_token_id=0,
        custom_generate=tiny_model.custom_generate,
        return_dict_in_generate=True,
        **options,
    )
    for row, tokens in zip(output.sequences[:, 9:].tolist(), wanted, strict=True):
        assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {0}
    assert max(map(max, output.acceptance_lengths)) > 1


def test_beams_are_refused(tiny_model):
    with pytest.raises(InvalidInput, match="unset num_beams"):
        tiny_model.backbone.generate(
            random_prompt(4), num_beams=2, max_new_tokens=4, pad_token_id=0, custom_generate=tiny_model.custom_generate
        )


def test_streamer_gets_the_text_of_generate(embedded_model, embedded_tokenizer):
    ids = embedded_tokenizer("def read(path):\n    with open(path)", return_tensors="pt")["input_ids"]
    streamer = TextIteratorStreamer(embedded_tokenizer, skip_prompt=True)
    output = embedded_model.generate(ids, max_new_tokens=24, streamer=streamer)
    assert "".join(streamer) == embedded_tokenizer.decode(output[0, ids.shape[1] :])


def test_streamer_is_for_one_row(tiny_model, embedded_tokenizer):
    with pytest.raises(InvalidInput, match=r"use model\.stream for batches"):
        tiny_model.generate(random_prompt(4).expand(2, -1), streamer=TextIteratorStreamer(embedded_tokenizer))


def test_stop_strings_end_where_transformers_ends(embedded_model, embedded_tokenizer):
    ids = embedded_tokenizer("import os\nimport sys\n\n\ndef main():\n", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 60, "stop_strings": ["(", "return"], "tokenizer": embedded_tokenizer}
    wanted = embedded_model.backbone.generate(ids, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(embedded_model.generate(ids, **options), wanted)
    assert wanted.shape[1] < ids.shape[1] + 60
    with pytest.raises(InvalidInput, match="needs the tokenizer"):
        embedded_model.generate(ids, stop_strings="(")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, InvalidInput, "the prompt is empty"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, InvalidInput, "the prompt is empty"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, InvalidInput, r"expected a tensor of integers \(batch, length\)"),
        ({"input_ids": torch.zeros(1, 4)}, InvalidInput, "expected a tensor of integers"),
        ({"input_ids": torch.tensor([[1, 64]])}, InvalidInput, "the vocabulary has 64 tokens"),
        ({"input_ids": torch.tensor([[1, -1]])}, InvalidInput, "go from -1"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, InvalidInput, "padding_side = 'left'"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, InvalidInput, "not left-padded"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0]])}, InvalidInput, "its prompt is empty"),
        ({"attention_mask": torch.ones(1, 5)}, InvalidInput, "they must agree"),
        ({"max_new_tokens": 0}, InvalidInput, "max_new_tokens is 0"),
        ({"input_ids": [[1, 2]]}, InvalidInput, "input_ids is list"),
        ({"attention_mask": [[1, 1, 1, 1]]}, InvalidInput, "they must agree"),
        ({"max_new_tokens": 5.5}, InvalidInput, "max_new_tokens is 5.5, expected an integer"),
        ({"seed": "a"}, InvalidInput, "seed is 'a'"),
        ({"stop_strings": [""]}, InvalidInput, "a stop string is empty"),
        ({"tree": "root"}, InvalidInput, "tree is a str"),
        ({"input_ids": torch.ones(1, 300, dtype=torch.long)}, ContextOverflow, "256; shorten the prompt"),
        ({"max_new_tokens": 253}, ContextOverflow, "exceed the context of 256; lower max_new_tokens to 252"),
        ({"tree": MedusaTree.dense([1, 1, 1, 1])}, InvalidTree, "needs 4 heads, there are 3"),
    ],
)
def test_bad_request_is_refused_before_any_work(tiny_model, arguments, error, message, monkeypatch):
    monkeypatch.setattr(tiny_model, "prefill", lambda *_: pytest.fail("work was done"))
    request = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "max_new_tokens": 5, **arguments}
    with pytest.raises(error, match=message):
        tiny_model.stream(**request)


def test_processor_with_state_is_refused(tiny_model):
    watermark = SynthIDTextWatermarkLogitsProcessor(
        ngram_len=2, keys=[1, 2], sampling_table_size=16, sampling_table_seed=0, context_history_size=8, device="cpu"
    )
    with pytest.raises(InvalidInput, match="cannot follow a tree"):
        tiny_model.generate(random_prompt(4), logits_processor=LogitsProcessorList([watermark]))


def test_processors_that_count_rows_are_refused(tiny_model):
    with pytest.raises(InvalidInput, match="PrefixConstrainedLogitsProcessor"):
        tiny_model.backbone.generate(
            random_prompt(4),
            max_new_tokens=4,
            pad_token_id=0,
            prefix_allowed_tokens_fn=lambda batch, ids: [1],
            custom_generate=tiny_model.custom_generate,
        )


def test_minimum_length_counts_from_the_padded_prompt(tiny_model):
    prompts = [random_prompt(9), random_prompt(4, seed=1)]
    ids, mask = left_padded(prompts)
    eos = plain_greedy(tiny_model.backbone, prompts[1], 20)[1]
    options = {"max_new_tokens": 20, "min_new_tokens": 6, "eos_token_id": eos}
    wanted = [plain_greedy(tiny_model.backbone, prompt, **options) for prompt in prompts]
    output = tiny_model.backbone.generate(
        ids, attention_mask=mask, pad_token_id=0, do_sample=False, custom_generate=tiny_model.custom_generate, **options
    )
    for row, tokens in zip(output[:, 9:].tolist(), wanted, strict=True):
        assert row[: len(tokens)] == tokens


@pytest.mark.parametrize("settings", [{"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.4}, {"suppress_tokens": [27, 1]}])
def test_generation_config_of_the_backbone_is_honoured(settings):
    backbone = tiny_backbone()
    backbone.generation_config.update(**settings)
    model = MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=48))
    prompt = random_prompt(9)
    wanted = plain_greedy(backbone, prompt, 30)
    assert model.generate(prompt, max_new_tokens=30)[0, 9:].tolist() == wanted
    backbone.generation_config = type(backbone.generation_config)(pad_token_id=0)
    assert plain_greedy(backbone, prompt, 30) != wanted


def test_heads_given_to_two_models_serve_both():
    heads = random_heads(tiny_backbone())
    exact = MedusaModel(tiny_backbone(), heads)
    MedusaModel(tiny_backbone(dtype=torch.bfloat16), heads)
    assert exact.generate(random_prompt(5), max_new_tokens=8).shape == (1, 13) and heads.dtype == torch.float32


def test_sampling_settings_without_sampling_warn(tiny_model):
    with pytest.warns(UserWarning, match="do nothing without do_sample"):
        tiny_model.generate(random_prompt(4), max_new_tokens=2, temperature=0.7)


def test_embedded_folder_is_good_for_auto_classes(embedded_tokenizer):
    backbone = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    assert backbone.config.vocab_size == len(embedded_tokenizer) == 4096
    assert MedusaConfig.load(EMBEDDED).medusa_num_heads == 5


def test_unknown_config_key_names_the_nearest():
    from medusa.config import from_mapping

    with pytest.raises(ConfigError, match="did you mean 'vocab_size'"):
        from_mapping(MedusaConfig, {"hidden_size": 8, "vocabsize": 16}, "x.yaml")
    with pytest.raises(ConfigError, match="hidden_size is 'big'"):
        from_mapping(MedusaConfig, {"hidden_size": "big", "vocab_size": 16}, "x.yaml")
    with pytest.raises(ConfigError, match="vocab_size must be given"):
        from_mapping(MedusaConfig, {"hidden_size": 8}, "x.yaml")


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"hidden_size": 8})])
def test_broken_config_file_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MedusaConfig.load(tmp_path)
