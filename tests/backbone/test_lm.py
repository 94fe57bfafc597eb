"""Claims about backbones: tree attention equals plain attention, or the model is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from medusa import MedusaModel, MedusaTree
from medusa.backbone.lm import TreeLM
from medusa.errors import ContextOverflow, UnsupportedBackbone
from medusa.trees.tensors import Frame
from tiny import ARCHITECTURES, VOCAB, WINDOWED, random_prompt, tiny_backbone


@pytest.mark.parametrize("model_type", [*ARCHITECTURES])
def test_probe_accepts_the_architecture(model_type):
    TreeLM(tiny_backbone(model_type)).probe()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_probe_accepts_both_attention_implementations(model_type, attention):
    TreeLM(tiny_backbone(model_type, attention)).probe()


@pytest.mark.parametrize("model_type", [*WINDOWED])
def test_tree_logits_equal_path_logits_past_the_window(model_type):
    module = tiny_backbone(model_type, **WINDOWED[model_type])
    lm = TreeLM(module)
    tree = MedusaTree([(0,), (0, 0), (0, 1), (1,), (1, 0), (1, 0, 0)]).tensors()
    prompt, nodes = random_prompt(30), random_prompt(tree.num_nodes, seed=1)
    cache = lm.new_cache(64)
    with torch.inference_mode():
        lm.prefill(prompt, None, cache)
        length = torch.tensor([30])
        hidden = lm.verify(nodes, tree, Frame(length[0], length, torch.zeros(1, dtype=torch.long), 30 + tree.num_nodes), cache)
        for node, lineage in enumerate(tree.lineage[0]):
            chain = torch.cat([prompt[0], nodes[0, lineage[lineage >= 0]]])[None]
            wanted = module(input_ids=chain, use_cache=False).logits[0, -1]
            torch.testing.assert_close(lm.logits(hidden[0, node]), wanted, atol=2e-3, rtol=2e-4)


def test_kept_cache_equals_a_fresh_prefill():
    lm = TreeLM(tiny_backbone())
    tree = MedusaTree([(0,), (1,), (1, 0), (1, 1), (1, 1, 0)]).tensors()
    prompt, nodes = random_prompt(10), random_prompt(tree.num_nodes, seed=1)
    path = torch.tensor([0, 2, 4, 5])
    kept, fresh = lm.new_cache(40), lm.new_cache(40)
    with torch.inference_mode():
        lm.prefill(prompt, None, kept)
        length = torch.tensor([10])
        lm.verify(nodes, tree, Frame(length[0], length, torch.zeros(1, dtype=torch.long), 10 + tree.num_nodes), kept)
        kept.keep(10 + path[None], 10 + torch.arange(4)[None])
        lm.prefill(torch.cat([prompt, nodes[:, path]], 1), None, fresh)
    for a, b in zip(kept.layers, fresh.layers, strict=True):
        torch.testing.assert_close(a.keys[:, :, :14], b.keys[:, :, :14], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.values[:, :, :14], b.values[:, :, :14], atol=1e-4, rtol=1e-4)


def test_cache_is_allocated_once():
    lm = TreeLM(tiny_backbone())
    cache = lm.new_cache(40)
    tree = MedusaTree([(0,)]).tensors()
    with torch.inference_mode():
        lm.prefill(random_prompt(10), None, cache)
        before = [layer.keys.data_ptr() for layer in cache.layers]
        length = torch.tensor([10])
        lm.verify(random_prompt(2), tree, Frame(length[0], length, torch.zeros(1, dtype=torch.long), 12), cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert all(layer.keys.shape[2] == 40 for layer in cache.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
        ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    ],
)
def test_alibi_models_are_refused(model_type, overrides, dtype):
    with pytest.raises(UnsupportedBackbone):
        TreeLM(tiny_backbone(model_type, dtype=dtype, **overrides)).probe()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3_text", "deepseek_v3"])
def test_probe_accepts_low_precision(model_type, dtype):
    TreeLM(tiny_backbone(model_type, dtype=dtype)).probe()


def test_context_ends_where_the_rotation_would_change():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 24,
    }
    backbone = tiny_backbone("phi3", rope_parameters=rope, original_max_position_embeddings=24)
    with pytest.raises(ContextOverflow, match="exceed the context of 24"):
        MedusaModel(backbone).generate(random_prompt(10), max_new_tokens=20)


def test_gpt_neo_is_refused():
    with pytest.raises(UnsupportedBackbone, match="GPT-Neo"):
        TreeLM(tiny_backbone("gpt_neo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 2]]))


def test_recurrent_model_is_refused_with_the_reason():
    config = AutoConfig.for_model(
        "qwen3_next",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    with pytest.raises(UnsupportedBackbone, match="a recurrent state cannot hold the branches of a tree"):
        TreeLM(AutoModelForCausalLM.from_config(config))


def test_encoder_decoder_is_refused():
    config = AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    with pytest.raises(UnsupportedBackbone, match="encoder-decoder"):
        MedusaModel(AutoModelForSeq2SeqLM.from_config(config))


def test_encoder_is_refused():
    config = AutoConfig.for_model(
        "bert", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(UnsupportedBackbone, match="no LM head"):
        MedusaModel(AutoModel.from_config(config))


def test_model_without_tree_masks_is_refused_with_the_remedy():
    backbone = tiny_backbone()
    backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedBackbone, match="attn_implementation='sdpa' or 'eager'"):
        MedusaModel(backbone)


def test_something_else_than_a_model_is_refused():
    with pytest.raises(UnsupportedBackbone, match="from_pretrained"):
        MedusaModel("folder")
