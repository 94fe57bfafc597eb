"""Claims about Medusa heads and their files."""

import json
import pickle

import pytest
import torch
from torch import nn

from medusa import MedusaHeads, MedusaModel, MedusaTree
from medusa.errors import CheckpointError
from medusa.heads import load_heads, save_heads
from tiny import VOCAB, random_heads, tiny_backbone


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_untrained_head_says_what_the_lm_head_says(shared, num_layers):
    lm_head = nn.Linear(16, 32)
    heads = MedusaHeads.for_lm_head(lm_head, 3, num_layers, shared)
    h = torch.randn(2, 5, 16)
    logits = heads(h)
    assert logits.shape == (3, 2, 5, 32)
    for k in range(3):
        torch.testing.assert_close(logits[k], lm_head(h))


def test_head_is_the_papers_formula():
    heads = MedusaHeads(8, 16, 1)
    nn.init.normal_(heads[0][0].linear.weight)
    nn.init.normal_(heads[0][0].linear.bias)
    h = torch.randn(4, 8)
    w1, b1, w2 = heads[0][0].linear.weight, heads[0][0].linear.bias, heads[0][1].weight
    inner = h @ w1.T + b1
    torch.testing.assert_close(heads(h)[0], (h + inner * torch.sigmoid(inner)) @ w2.T)


def test_layers_of_a_head_are_distinct_blocks():
    heads = MedusaHeads(8, 16, 1, num_layers=2)
    assert heads[0][0].linear.weight is not heads[0][1].linear.weight


def test_only_the_heads_asked_for_run():
    heads = MedusaHeads(8, 16, 5)
    heads[4][0].linear.weight.data.fill_(torch.nan)
    logits = heads(torch.randn(1, 8), num_heads=4)
    assert logits.shape == (4, 1, 16) and not logits.isnan().any()


def test_parameters_have_the_names_of_the_v01_format():
    assert set(MedusaHeads(8, 16, 2, num_layers=2).state_dict()) == {
        f"{k}.{name}"
        for k in range(2)
        for name in ("0.linear.weight", "0.linear.bias", "1.linear.weight", "1.linear.bias", "2.weight")
    }


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_save_and_load_round_trip_is_bit_equal(tmp_path, shared, num_layers):
    backbone = tiny_backbone(dtype=torch.bfloat16)
    heads = random_heads(backbone, 2, num_layers, shared)
    save_heads(heads, tmp_path, base_model="base")
    loaded = load_heads(tmp_path)
    assert loaded.config == MedusaHeads(64, VOCAB, 2, num_layers, shared).config.__class__(
        **{**heads.config.__dict__, "base_model_name_or_path": "base"}
    )
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and tensor.dtype == torch.bfloat16


def test_saved_config_is_readable_by_engines_of_older_formats(tmp_path):
    save_heads(MedusaHeads(8, 16, 3), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "medusa" and config["medusa_fc_bias"] is True
    assert config["medusa_num_heads"] == config["num_medusa_heads"] == 3
    assert "architectures" not in config


def test_file_is_believed_over_the_config(tmp_path):
    save_heads(MedusaHeads(8, 16, 5), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "medusa_num_heads": 2}))
    assert len(load_heads(tmp_path)) == 5


def test_v01_pickle_of_tensors_loads(tmp_path):
    heads = MedusaHeads(8, 16, 2)
    torch.save(heads.state_dict(), tmp_path / "medusa_lm_head.pt")
    assert len(load_heads(tmp_path)) == 2


class _Bomb:
    def __reduce__(self):
        return (print, ("code in a pickle ran",))


def test_pickle_with_code_is_refused(tmp_path, capsys):
    (tmp_path / "medusa_lm_head.pt").write_bytes(pickle.dumps({"0.0.linear.weight": _Bomb()}))
    with pytest.raises(CheckpointError, match="holds code and was not loaded"):
        load_heads(tmp_path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [[1, 2], {1: torch.zeros(2)}, {"0.0.linear.weight": 3}, {"0.1.weight": torch.zeros(2).int()}]
)
def test_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match="wanted"):
        load_heads(tmp_path)


@pytest.mark.parametrize("content", [b"no pickle", b"\x80\x02.", b""])
def test_file_that_is_no_pickle_is_refused(tmp_path, content):
    (tmp_path / "medusa_lm_head.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="was not loaded"):
        load_heads(tmp_path)


def test_names_for_more_heads_than_tensors_are_refused(tmp_path):
    torch.save({"99999999.0.weight": torch.zeros(2, 2)}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match="names for 100000000 heads"):
        load_heads(tmp_path)


def test_missing_heads_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no Medusa heads in"):
        load_heads(tmp_path)


def test_truncated_heads_file_is_refused(tmp_path):
    save_heads(MedusaHeads(8, 16, 2), tmp_path)
    path = tmp_path / "medusa_lm_head.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="broken or truncated"):
        load_heads(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.0.linear.bias"), "1.0.linear.bias has shape None"),
        (lambda t: t.update({"1.1.weight": torch.zeros(16, 9)}), r"1.1.weight has shape \(16, 9\), wanted \(16, 8\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(8)}), "model.norm.weight; wanted names like"),
    ],
)
def test_wrong_tensor_is_named(tmp_path, change, message):
    from safetensors.torch import save_file

    tensors = dict(MedusaHeads(8, 16, 2).state_dict())
    change(tensors)
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_heads(tmp_path)


@pytest.mark.parametrize(("hidden", "vocab"), [(32, VOCAB), (64, VOCAB + 1)])
def test_heads_of_another_size_are_refused_by_the_model(hidden, vocab):
    with pytest.raises(CheckpointError, match="use heads trained on this backbone"):
        MedusaModel(tiny_backbone(), MedusaHeads(hidden, vocab, 1), MedusaTree([(0,)]))
