"""Claims about int8-dynamic and int4-dynamic backbones on disk: saved packed, they load as they were, and say what they are."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from medusa import MedusaModel
from medusa.checkpoints.conversion import convert
from medusa.checkpoints.loading import load_backbone
from medusa.checkpoints.quantization import BITS, quantized
from medusa.checkpoints.writer import save_heads
from medusa.errors import CheckpointError, InvalidInput
from medusa.kernels.quantized import QuantizedLinear
from tiny import plain_greedy, random_heads, random_prompt, tiny_backbone

KINDS = sorted(BITS)


@pytest.fixture
def folder(tmp_path):
    """A backbone with heads in one folder."""
    backbone = tiny_backbone(dtype=torch.bfloat16, tie_word_embeddings=True)
    backbone.save_pretrained(tmp_path / "whole")
    save_heads(random_heads(backbone), tmp_path / "heads")
    return tmp_path


def state(model):
    return {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "mixtral"])  # tied; Conv1D; biases; experts in one tensor
def test_a_saved_backbone_loads_packed_and_is_the_same_to_the_bit(tmp_path, kind, model_type):
    tiny_backbone(model_type, dtype=torch.bfloat16, tie_word_embeddings=model_type == "llama").save_pretrained(tmp_path / "it")
    before = load_backbone(tmp_path / "it", **quantized(kind))
    before.save_pretrained(tmp_path / "saved")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # transformers' own door
    wanted, got = state(before), state(after)
    assert wanted.keys() == got.keys()
    for name, (dtype, tensor) in wanted.items():
        assert got[name][0] == dtype and torch.equal(got[name][1], tensor), name
    assert sum(isinstance(module, QuantizedLinear) for module in after.modules()) > 8
    prompt = random_prompt(9)
    with torch.no_grad():
        assert torch.equal(after(prompt).logits, before(prompt).logits)
    again = load_backbone(tmp_path / "saved", dtype=torch.float32)  # scales stay float16
    assert all(module.scale.dtype == torch.float16 for module in again.modules() if isinstance(module, QuantizedLinear))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_quantised_model_is_one_folder_that_decodes_as_itself(folder, kind):
    convert(folder / "heads", folder / "out", "merged", backbone=str(folder / "whole"), quantization=kind)
    model = MedusaModel.from_pretrained(folder / "out")
    assert model.num_heads == 3 and type(model.lm.lm_head) is nn.Linear
    assert model.lm.lm_head.weight is model.backbone.get_input_embeddings().weight
    now = MedusaModel.from_pretrained(folder / "whole", heads=folder / "heads", **quantized(kind))
    prompt = random_prompt(10)
    got = model.generate(prompt, max_new_tokens=24)
    assert torch.equal(got, now.generate(prompt, max_new_tokens=24))
    assert got[0, 10:].tolist() == plain_greedy(model.backbone, prompt, 24)
    size = {name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) for name in ("out", "whole")}
    assert size["out"] < size["whole"] + sum(file.stat().st_size for file in (folder / "heads").glob("*.safetensors"))


def test_gpt2_maps_compute_what_torchs_own_would(tmp_path):
    backbone = tiny_backbone("gpt2")
    conv = backbone.transformer.h[0].mlp.c_fc
    linear = nn.Linear(*conv.weight.shape)
    linear.weight, linear.bias = nn.Parameter(conv.weight.T.contiguous()), conv.bias
    backbone.save_pretrained(tmp_path / "it")
    x = torch.randn(3, conv.weight.shape[0], generator=torch.Generator().manual_seed(0))
    rounded = load_backbone(tmp_path / "it", **quantized("int8-dynamic")).transformer.h[0].mlp.c_fc
    assert torch.equal(rounded(x), QuantizedLinear(linear, 8)(x))


def test_an_adapter_is_merged_before_the_weights_are_rounded(folder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_backbone(dtype=torch.bfloat16, tie_word_embeddings=True), config).save_pretrained(folder / "heads")
    model = MedusaModel.from_pretrained(folder / "whole", heads=folder / "heads", **quantized("int8-dynamic"))
    merged = load_backbone(folder / "whole", adapters=[folder / "heads"])
    layer = merged.model.layers[1].mlp.down_proj
    assert torch.equal(model.backbone.model.layers[1].mlp.down_proj.weight, QuantizedLinear(layer, 8).weight)
    convert(folder / "heads", folder / "out", "merged", backbone=str(folder / "whole"), quantization="int8-dynamic")
    prompt = random_prompt(10)
    again = MedusaModel.from_pretrained(folder / "out")
    assert torch.equal(again.generate(prompt, max_new_tokens=16), model.generate(prompt, max_new_tokens=16))
    load_backbone(folder / "whole", **quantized("int8-dynamic")).save_pretrained(folder / "rounded")
    with pytest.raises(CheckpointError, match="no adapter can be added to weights that are quantised; give the original"):
        MedusaModel.from_pretrained(folder / "rounded", heads=folder / "heads")


def test_what_cannot_be_loaded_or_quantised_is_said_in_one_line(folder):
    with pytest.raises(InvalidInput, match="v2 holds no backbone to quantise; write --to merged"):
        convert(folder / "heads", folder / "out", "v2", backbone=str(folder / "whole"), quantization="int4-dynamic")
    load_backbone(folder / "whole", **quantized("int4-dynamic")).save_pretrained(folder / "saved")
    with pytest.raises(InvalidInput, match="is quantised already and cannot be int8-dynamic as well; leave --quantization out"):
        load_backbone(folder / "saved", **quantized("int8-dynamic"))
    for source in ("saved", "whole"):
        with pytest.raises((CheckpointError, InvalidInput), match=r"got torch.float16 on cpu; choose another --dtype"):
            load_backbone(folder / source, torch.float16, **(quantized("int8-dynamic") if source == "whole" else {}))
    config = json.loads((folder / "saved" / "config.json").read_text())
    assert config["quantization_config"] == {"bits": 4, "layout": 1, "quant_method": "medusa"}
    for wrong in ({"layout": 2}, {"bits": 3}):
        changed = config | {"quantization_config": config["quantization_config"] | wrong}
        (folder / "saved" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="expected 4 or 8 in layout 1"):
            load_backbone(folder / "saved")
    with pytest.warns(UserWarning, match="most weights of MixtralForCausalLM are not in linear layers and stay in"):
        tiny_backbone("mixtral", dtype=torch.bfloat16).save_pretrained(folder / "experts")
        load_backbone(folder / "experts", **quantized("int8-dynamic"))
