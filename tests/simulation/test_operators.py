"""Claims about operators and shapes: Table 5, and real models' own weights and FLOPs."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medusa import DynamicTree
from medusa.errors import CheckpointError, ConfigError
from medusa.simulation.operators import BEAM, RANKS, attention, expert_linear, layers, linear, memory, step_operators
from medusa.simulation.shapes import BUILT_IN, ModelShape, load_shape, shape_of
from medusa.trees import dynamic
from tiny import ARCHITECTURES, tiny_backbone

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
MODELLED = [name for name in ARCHITECTURES if name != "deepseek_v3"]
SMALL = ModelShape(hidden=24, intermediate=40, layers=3, heads=4, kv_heads=4, head_dim=6, vocabulary=100)


@pytest.mark.parametrize("phase", ["prefill", "decoding", "medusa"])
def test_operators_have_the_complexities_of_table_5(phase):
    b, s = 3, 50
    q = {"prefill": s, "decoding": 1, "medusa": 7}[phase]
    sizes = dict(b=b, s=s, q=q, h=24, i=40, n=4, d=6)
    ours = {operator.name: operator for operator in layers(SMALL, b, s, q)}
    alike = {"q": ("q", "k", "v"), "qk": ("qk", "pv"), "up": ("up", "gate", "down")}
    for name, computation, space in PAPER["table5"][phase]:
        for operator in (ours[other] for other in alike[name]):
            assert operator.flops == 2 * eval(computation, sizes)  # a multiplication and an addition
            assert operator.bytes == 2 * eval(space, sizes)  # 16 bits an element


def test_grouped_queries_share_the_reading_of_keys_but_not_arithmetic():
    full, grouped = attention("qk", 2, 100, 5, 8, 8, 16), attention("qk", 2, 100, 5, 8, 2, 16)
    assert full.flops == grouped.flops
    assert full.bytes - grouped.bytes == 2 * 2 * 100 * 6 * 16


def test_rows_of_a_mixture_read_more_experts_the_more_they_are():
    one, many = (expert_linear("up", rows, 32, 64, experts=8, chosen=2) for rows in (1, 1000))
    assert one.weights == pytest.approx(2 * 32 * 64) and one.rows == pytest.approx(1)
    assert many.weights == pytest.approx(8 * 32 * 64) and many.rows == pytest.approx(250)
    assert many.flops == 1000 * one.flops
    # Rows choose at random: simulated, the share of experts read is the expected one.
    torch.manual_seed(0)
    read = sum(len({*torch.rand(3, 8).topk(2).indices.flatten().tolist()}) for _ in range(2000)) / 2000
    assert expert_linear("up", 3, 32, 64, 8, 2).weights / (32 * 64) == pytest.approx(read, rel=0.02)


@pytest.mark.parametrize("name", MODELLED)
def test_weights_counted_from_a_config_are_the_models_own(name):
    backbone = tiny_backbone(name)
    shape = shape_of(backbone.config)
    blocks = [(key, value) for key, value in backbone.named_parameters() if ".layers." in key or ".h." in key]
    held = sum(value.numel() for key, value in blocks if value.ndim > 1 and "bias" not in key)
    tables = 2 * shape.hidden * shape.vocabulary
    assert memory(shape, b=1, s=0, element=1, weight=1) - tables == pytest.approx(held)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_flops_of_a_step_are_those_torch_counts(name):
    backbone = tiny_backbone(name, attention="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.ones(2, 12, dtype=torch.long))
    ours = sum(operator.count * operator.flops for operator in step_operators(shape_of(backbone.config), b=2, s=12, q=12))
    rotation = 2 * 8 * 12  # llama's angles are a product of (b, 8, 1) with (b, 1, 12), or for all rows at once, or none
    assert counter.get_total_flops() in (ours, ours + rotation, ours + 2 * rotation)


def test_medusa_heads_are_run_on_one_row_of_each_sequence():
    plain, own = step_operators(SMALL, 2, 10, 5), step_operators(SMALL, 2, 10, 5, num_heads=3)
    added = [operator for operator in own if operator.name.startswith("head ")]
    assert len(own) == len(plain) + 2
    assert sum(o.count * o.flops for o in added) == 3 * 2 * (2 * 24 * 24 + 2 * 24 * 100)
    shared = [o for o in step_operators(SMALL, 2, 10, 5, num_heads=3, own_lm_heads=False) if o.name == "head logits"]
    assert [(o.count, o.rows, o.weights) for o in shared] == [(1, 6, 2400)]  # the LM head is read once


def test_quantised_weights_are_fewer_bytes_for_the_same_arithmetic():
    full, quarter = linear("up", 4, 32, 64), linear("up", 4, 32, 64, weight=0.5)
    assert full.flops == quarter.flops and full.bytes - quarter.bytes == 1.5 * 32 * 64


def test_a_saved_config_is_read_as_the_model_is(tmp_path):
    backbone = tiny_backbone("gpt2")
    backbone.config.save_pretrained(tmp_path)
    assert load_shape(str(tmp_path)) == shape_of(backbone.config)
    assert load_shape("llama-33b") == BUILT_IN["llama-33b"]


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"model_type": "llama", "hidden_size": 64}, ConfigError, "lacks num_hidden_layers, num_attention_heads, vocab_size"),
        (
            {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9},
            ConfigError,
            "num_attention_heads",
        ),
        ({"hidden_size": 64}, CheckpointError, "no model config"),
    ],
)
def test_configs_without_the_needed_sizes_are_refused(tmp_path, config, error, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        load_shape(str(tmp_path))


def test_attention_that_is_not_modelled_is_refused():
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        shape_of(tiny_backbone("deepseek_v3").config)


def test_heads_that_read_cost_their_matrices_and_a_shortlist_per_depth():
    shape = next(iter(BUILT_IN.values()))
    cost = {
        kind: sum(o.count * o.bytes for o in step_operators(shape, 1, 64, 17, 4, False, heads_kind=kind))
        for kind in ("medusa", "root", "path")
    }
    h = shape.hidden
    assert cost["root"] - cost["medusa"] == pytest.approx(4 * 2 * h * h, rel=0.01)
    assert cost["path"] - cost["root"] == pytest.approx((1 + 2 + 3) * 2 * h * h, rel=0.02)
    assert (dynamic.BEAM, DynamicTree(2, 1).ranks) == (BEAM, RANKS)
