"""Claims about conversion: from any format into any other and back, heads are the same to the bit."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medusa import EMBEDDED, MedusaHeads, MedusaModel
from medusa.checkpoints.conversion import convert
from medusa.checkpoints.reader import load_heads, open_checkpoint
from medusa.checkpoints.writer import FORMATS, save_heads, write_checkpoint
from medusa.errors import CheckpointError, InvalidInput
from tiny import VOCAB, plain_greedy, random_heads, random_prompt, tiny_backbone

HIDDEN = 8


def some_heads(num_heads, num_layers, shared=False, bias=False, dtype=torch.float32, lm_head=None) -> MedusaHeads:
    """Random heads; with the LM head that they share, or a copy of it each."""
    heads = MedusaHeads(HIDDEN, VOCAB, num_heads, num_layers, shared, bias, dtype=dtype)
    generator = torch.Generator().manual_seed(num_heads)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if lm_head is not None and not shared:
            for k in range(num_heads):
                heads.lm_head(k).load_state_dict(lm_head.state_dict())
    return heads


@pytest.fixture
def backbone_folder(tmp_path):
    """As much of a backbone as a merged model is made of."""
    folder = tmp_path / "backbone"
    folder.mkdir()
    save_file({"model.norm.weight": torch.ones(HIDDEN)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN}))
    return folder


def logits(heads, lm_head):
    heads.share(lm_head)
    return heads(torch.linspace(-1, 1, 3 * HIDDEN).view(3, HIDDEN).to(heads.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("num_heads", [1, 5])
def test_any_format_into_any_other(tmp_path, backbone_folder, num_heads, num_layers, shared, dtype):
    lm_head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype)
    heads = some_heads(num_heads, num_layers, shared, dtype=dtype, lm_head=lm_head)  # LM heads that v2 can share
    wanted = logits(heads, lm_head)
    formats = [to for to in FORMATS if to != "v2" or num_layers == 1]
    for first in formats:
        write_checkpoint(heads, tmp_path / first, first, "base", lm_head, backbone_folder)
        once = load_heads(tmp_path / first)
        for second in formats:
            write_checkpoint(once, tmp_path / first / second, second, "base", lm_head, backbone_folder)
            twice = load_heads(tmp_path / first / second)
            assert len(twice) == num_heads and twice.num_layers == num_layers and twice.dtype == dtype
            alike = twice.config.medusa_shared_lm_head == shared  # else one product for all heads, rounded otherwise
            torch.testing.assert_close(logits(twice, lm_head), wanted, **({"rtol": 0, "atol": 0} if alike else {}))
            found = twice.state_dict()
            if "v2" in (first, second) and not shared:  # whose LM head is the backbone's
                found |= {f"{k}.{num_layers}.weight": lm_head.weight for k in range(num_heads)}
            assert all(torch.equal(found[name], tensor) for name, tensor in heads.state_dict().items()), (first, second)


@pytest.mark.parametrize("to", ["medusa", "merged"])
def test_bias_of_lm_heads_survives(tmp_path, backbone_folder, to):
    heads = some_heads(2, 1, bias=True)
    write_checkpoint(heads, tmp_path / "out", to, backbone=backbone_folder)
    assert all(torch.equal(load_heads(tmp_path / "out").state_dict()[name], t) for name, t in heads.state_dict().items())


@pytest.mark.parametrize("to", ["v0.1", "vllm"])
@pytest.mark.parametrize("shared", [False, True])
def test_bias_that_a_format_has_no_place_for_is_refused(tmp_path, to, shared):
    heads = some_heads(2, 1, shared=shared, bias=not shared)
    with pytest.raises(CheckpointError, match=f"{to} has no bias on LM heads"):
        write_checkpoint(heads, tmp_path / "out", to, lm_head=nn.Linear(HIDDEN, VOCAB))
    assert not list(tmp_path.glob("out*"))


def test_v2_is_refused_where_it_would_be_other_heads(tmp_path):
    lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
    with pytest.raises(CheckpointError, match="head 1 has another"):
        write_checkpoint(some_heads(2, 1), tmp_path / "out", "v2", lm_head=lm_head)
    with pytest.raises(CheckpointError, match="one residual block per head, these have 2"):
        write_checkpoint(some_heads(2, 2, shared=True), tmp_path / "out", "v2", lm_head=lm_head)


@pytest.mark.parametrize("to", ["v0.1", "vllm"])
def test_lm_head_that_is_wanted_and_not_given_is_asked_for(tmp_path, to):
    with pytest.raises(InvalidInput, match="--backbone"):
        write_checkpoint(some_heads(2, 1, shared=True), tmp_path / "out", to)


def test_vllm_gets_the_keys_it_asks_for(tmp_path):
    lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
    write_checkpoint(some_heads(3, 2, shared=True), tmp_path / "out", "vllm", "base", lm_head)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "medusa" and config["hidden_size"] == HIDDEN and config["vocab_size"] == VOCAB
    assert config["num_heads"] == 3 and config["num_hidden_layers"] == 2 and config["medusa_fc_bias"] is True
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    blocks = {f"blocks.{k}.layers.{layer}.{kind}" for k in range(3) for layer in range(2) for kind in ("weight", "bias")}
    assert config["original_lm_head"] is True and names == blocks | {"lm_head.weight"}
    write_checkpoint(some_heads(1, 1), tmp_path / "own", "vllm")
    assert "lm_heads.0.weight" in load_file(tmp_path / "own" / "model.safetensors")


def test_ours_is_readable_as_v01_by_engines(tmp_path):
    save_heads(some_heads(3, 1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "medusa" and config["medusa_fc_bias"] is True
    assert config["medusa_num_heads"] == config["num_medusa_heads"] == 3
    assert "architectures" not in config  # else TGI takes it for a whole model


@pytest.fixture
def backbone(tmp_path):
    backbone = tiny_backbone()
    backbone.save_pretrained(tmp_path / "backbone", max_shard_size="80KB")  # several shards
    return backbone


def greedy(folder, heads=None):
    model = MedusaModel.from_pretrained(folder, heads)
    prompt = random_prompt(9)
    tokens = model.generate(prompt, max_new_tokens=20)[0, 9:].tolist()
    assert tokens == plain_greedy(model.backbone, prompt, 20)
    return model, tokens


def test_merged_model_is_backbone_and_heads_in_one_folder(tmp_path, backbone):
    heads = random_heads(backbone)
    save_heads(heads, tmp_path / "heads", base_model=str(tmp_path / "backbone"))
    found = convert(tmp_path / "heads", tmp_path / "whole", "merged")
    assert found.format == "merged" and found.num_heads == 3
    model, tokens = greedy(tmp_path / "whole")
    assert tokens == plain_greedy(backbone, random_prompt(9), 20)
    assert all(torch.equal(model.heads.state_dict()[name], tensor) for name, tensor in heads.state_dict().items())
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name.split(".")[0] for name in index} == {"model", "lm_head", "medusa_head"}
    assert set(index.values()) == {path.name for path in (tmp_path / "whole").glob("*.safetensors")}
    # And out again, and into one with other heads in the place of these.
    convert(tmp_path / "whole", tmp_path / "again", "medusa")
    save_heads(random_heads(backbone, 1), tmp_path / "one", base_model=str(tmp_path / "whole"))
    convert(tmp_path / "one", tmp_path / "other", "merged")
    assert greedy(tmp_path / "backbone", tmp_path / "again")[1] == tokens
    assert greedy(tmp_path / "other")[0].num_heads == 1


@pytest.mark.parametrize("tie", [False, True])
def test_merged_model_has_the_adapter_in_its_weights(tmp_path, tie):
    peft = pytest.importorskip("peft")
    backbone = tiny_backbone(tie_word_embeddings=tie)
    backbone.save_pretrained(tmp_path / "backbone")
    save_heads(random_heads(backbone), tmp_path / "heads", base_model=str(tmp_path / "backbone"))
    backbone.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    backbone.save_pretrained(tmp_path / "heads")
    convert(tmp_path / "heads", tmp_path / "whole", "merged")
    tokens = greedy(tmp_path / "whole")[1]
    assert tokens == greedy(tmp_path / "backbone", tmp_path / "heads")[1] != plain_greedy(tiny_backbone(), random_prompt(9), 20)
    with pytest.warns(UserWarning, match="has the adapter"):
        convert(tmp_path / "heads", tmp_path / "vllm", "vllm")
    convert(tmp_path / "heads", tmp_path / "ours", "medusa")
    assert greedy(tmp_path / "backbone", tmp_path / "ours")[1] == tokens


def test_backbone_in_pickles_is_merged_too(tmp_path, backbone):
    (tmp_path / "pickles").mkdir()
    torch.save(backbone.state_dict(), tmp_path / "pickles" / "pytorch_model.bin")
    backbone.config.save_pretrained(tmp_path / "pickles")
    save_heads(random_heads(backbone), tmp_path / "pickles", config=False)
    convert(tmp_path / "pickles", tmp_path / "whole", "merged")
    assert greedy(tmp_path / "whole")[1] == plain_greedy(backbone, random_prompt(9), 20)


def test_shared_lm_head_is_taken_from_the_backbone(tmp_path, backbone):
    heads = random_heads(backbone, shared=True)
    save_heads(heads, tmp_path / "heads", base_model=str(tmp_path / "backbone"))
    for to, back in itertools.product(("v0.1", "vllm"), ("v2",)):
        convert(tmp_path / "heads", tmp_path / to, to)
        assert not load_heads(tmp_path / to).config.medusa_shared_lm_head
        convert(tmp_path / to, tmp_path / to / back, back)
        assert open_checkpoint(tmp_path / to / back).format == "v2"
        restored = load_heads(tmp_path / to / back).state_dict()
        assert all(torch.equal(restored[name], tensor) for name, tensor in heads.state_dict().items())


def test_embedded_heads_keep_their_tree(tmp_path):
    convert(EMBEDDED, tmp_path / "out", "vllm")
    assert (tmp_path / "out" / "medusa_tree.json").read_text() == (EMBEDDED / "medusa_tree.json").read_text()


def test_folder_that_holds_something_is_not_written_over(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InvalidInput, match="exists"):
        convert(EMBEDDED, tmp_path, "vllm")
    with pytest.raises(InvalidInput, match=r"expected one of medusa, v0\.1, v2, vllm, merged"):
        convert(EMBEDDED, tmp_path / "new", "gguf")
