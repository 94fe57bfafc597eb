"""Claims about placement: what a module computes does not depend on where its weights lie, nor on what they are wrapped in."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from medusa import MedusaHeads, MedusaModel
from medusa.checkpoints.adapter import load_adapter
from medusa.checkpoints.conversion import convert
from medusa.checkpoints.writer import save_heads, write_checkpoint
from medusa.errors import CheckpointError
from medusa.placement import device_of, is_plain, linear_map, linear_sizes
from medusa.runs.provenance import fingerprint
from tiny import plain_greedy, random_heads, random_prompt, random_tree, tiny_backbone

PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


def offloaded(folder: Path, *parts: str) -> dict:
    """What to load a model with so that these parts of it are on the disk."""
    return {"device_map": {part: "disk" if part in parts else "cpu" for part in PARTS}, "offload_folder": folder / "offloaded"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    backbone = tiny_backbone()
    backbone.save_pretrained(folder / "backbone")
    save_heads(random_heads(backbone), folder / "heads")
    save_heads(random_heads(backbone, shared=True), folder / "shared")
    return folder


@pytest.mark.parametrize("heads", ["heads", "shared"])
@pytest.mark.parametrize("part", [*PARTS[:3], "lm_head"])
def test_offloaded_part_changes_no_token(folder, tmp_path, part, heads):
    model = MedusaModel.from_pretrained(folder / "backbone", folder / heads, random_tree(1, 20), **offloaded(tmp_path, part))
    assert model.device == torch.device("cpu") and (model.vocab_size, model.heads.config.hidden_size) == (64, 64)
    prompt = random_prompt(9)
    whole = MedusaModel.from_pretrained(folder / "backbone", folder / heads)
    assert model.generate(prompt, max_new_tokens=12)[0, 9:].tolist() == plain_greedy(whole.backbone, prompt, 12)
    assert fingerprint(model.backbone) == fingerprint(whole.backbone)


def test_new_heads_copy_an_offloaded_lm_head(folder, tmp_path):
    backbone = AutoModelForCausalLM.from_pretrained(folder / "backbone", **offloaded(tmp_path, "lm_head"))
    lm_head = backbone.get_output_embeddings()
    assert lm_head.weight.is_meta
    wanted = AutoModelForCausalLM.from_pretrained(folder / "backbone").lm_head.weight
    assert torch.equal(MedusaHeads.for_lm_head(lm_head, 2).state_dict()["1.1.weight"], wanted)
    write_checkpoint(random_heads(tiny_backbone(), shared=True), tmp_path / "vllm", "vllm", lm_head=lm_head)


class Wrapped(nn.Module):
    """A linear map of which nothing is known but its input's size."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.in_features = inner, inner.in_features

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_map_of_a_wrapped_module_is_asked_for(dtype, bias):
    linear = nn.Linear(300, 40, bias=bias, dtype=dtype)  # wider than what is asked at a time
    assert is_plain(linear) and not is_plain(Wrapped(linear))
    weight, offset = linear_map(Wrapped(linear))
    assert linear_sizes(Wrapped(linear)) == (40, 300) and weight.dtype == dtype and (offset is not None) == bias
    if bias:
        assert torch.equal(offset, linear.bias)
        torch.testing.assert_close(weight, linear.weight, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=0)
    else:
        assert torch.equal(weight, linear.weight)


def test_map_under_an_adapter_is_that_with_the_adapter():
    linear = nn.Linear(16, 24, bias=False)
    holder = nn.ModuleDict({"map": linear})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["map"], init_lora_weights=False)
    wrapped = peft.inject_adapter_in_model(config, holder)["map"]
    weight, _ = linear_map(wrapped)
    torch.testing.assert_close(weight, linear.weight + wrapped.get_delta_weight("default"))
    assert device_of(wrapped) == torch.device("cpu")


def test_map_of_a_sharded_weight_is_whole(tmp_path):
    init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        linear = nn.Linear(16, 24, bias=False)
        wanted = linear.weight.detach().clone()
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]))
        linear.register_forward_pre_hook(lambda module, args: (distribute_tensor(args[0], module.weight.device_mesh),))
        linear.register_forward_hook(lambda module, args, output: output.full_tensor())
        assert not is_plain(linear)
        weight, _ = linear_map(linear)
        assert type(weight) is not DTensor and torch.equal(weight, wanted) and linear_sizes(linear) == (24, 16)
    finally:
        destroy_process_group()


def adapter(folder: Path, backbone, targets: list[str]) -> None:
    """A random LoRA on some modules of a backbone, as peft saves it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(backbone, config).save_pretrained(folder, save_embedding_layers=False)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj"], ["embed_tokens", "up_proj"]])
def test_adapter_on_one_of_two_that_share_a_matrix_leaves_the_other(tmp_path, targets):
    adapter(tmp_path, tiny_backbone(tie_word_embeddings=True), targets)
    prompt = random_prompt(9)
    kept = peft.PeftModel.from_pretrained(tiny_backbone(tie_word_embeddings=True), tmp_path)
    merged = tiny_backbone(tie_word_embeddings=True)
    load_adapter(merged, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(merged(prompt).logits, kept(prompt).logits, atol=1e-4, rtol=1e-4)


def test_adapter_of_an_offloaded_backbone_is_not_lost(folder, tmp_path):
    adapter(tmp_path / "adapter", tiny_backbone(), ["q_proj", "lm_head"])
    whole = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    apart = AutoModelForCausalLM.from_pretrained(folder / "backbone", **offloaded(tmp_path, "model.layers", "lm_head"))
    load_adapter(whole, tmp_path / "adapter")
    load_adapter(apart, tmp_path / "adapter")
    prompt = random_prompt(9)
    with torch.no_grad():
        torch.testing.assert_close(apart(prompt).logits, whole(prompt).logits, atol=1e-4, rtol=1e-4)
    assert (
        MedusaModel(apart).generate(prompt, max_new_tokens=8).tolist()
        == MedusaModel(whole).generate(prompt, max_new_tokens=8).tolist()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_module_that_was_trained_whole_takes_its_place(folder, tmp_path, tied):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = peft.get_peft_model(tiny_backbone(tie_word_embeddings=tied), config)
    with torch.no_grad():
        trained.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-1)
    trained.save_pretrained(tmp_path / "adapter")
    merged, prompt = tiny_backbone(tie_word_embeddings=tied), random_prompt(9)
    load_adapter(merged, tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        wanted = trained(prompt).logits
        torch.testing.assert_close(merged(prompt).logits, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again(prompt).logits, wanted, atol=1e-4, rtol=1e-4)
    apart = AutoModelForCausalLM.from_pretrained(folder / "backbone", **offloaded(tmp_path, "lm_head"))
    with pytest.raises(CheckpointError, match="it holds lm_head itself, which an offloaded backbone cannot take"):
        load_adapter(apart, tmp_path / "adapter")


def test_backbone_that_is_an_adapters_folder_is_merged_whole(folder, tmp_path):
    backbone = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    adapter(tmp_path / "adapter", backbone, ["q_proj", "lm_head"])
    convert(folder / "heads", tmp_path / "merged", "merged", backbone=str(tmp_path / "adapter"))
    whole = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    load_adapter(whole, tmp_path / "adapter")
    prompt = random_prompt(9)
    with torch.no_grad():
        got = MedusaModel.from_pretrained(tmp_path / "merged").backbone(prompt).logits
        torch.testing.assert_close(got, whole(prompt).logits, atol=1e-4, rtol=1e-4)
