"""Claims about reading: every format as it lies in the wild loads without being told which; what is wrong is named."""

import json
import logging
import os
import pickle
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from medusa import MedusaHeads, MedusaModel
from medusa.checkpoints.reader import has_heads, load_heads, open_checkpoint
from medusa.checkpoints.writer import save_heads
from medusa.errors import CheckpointError
from tiny import plain_greedy, random_heads, random_prompt, tiny_backbone

D, V = 8, 16
LAYOUTS = {  # as the formats' own code names a block's linear layer and a head's LM head
    "v0.1": ("{k}.{l}.linear", "{k}.{L}"),
    "merged": ("medusa_head.{k}.{l}.linear", "medusa_head.{k}.{L}"),
    "modelopt": ("medusa_heads.{k}.{l}.linear", "medusa_heads.{k}.{L}"),
    "vllm": ("blocks.{k}.layers.{l}", "lm_heads.{k}"),
    "vllm within a model": ("medusa_heads.blocks.{k}.layers.{l}", "medusa_heads.lm_heads.{k}"),
}


def tensors_of(layout="v0.1", num_heads=2, num_layers=1, bias=True, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors of heads under a layout's names."""
    generator = torch.Generator().manual_seed(0)
    block, lm_head = LAYOUTS[layout]
    found = {}
    for k in range(num_heads):
        for layer in range(num_layers):
            name = block.format(k=k, l=layer)
            found[f"{name}.weight"] = torch.randn(D, D, generator=generator)
            if bias:
                found[f"{name}.bias"] = torch.randn(D, generator=generator)
        found[lm_head.format(k=k, L=num_layers) + ".weight"] = torch.randn(V, D, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def by_hand(tensors, layout, num_heads, num_layers, h):
    """The logits of heads by the paper's formula, from the tensors in a file."""
    block, lm_head = LAYOUTS[layout]
    logits = []
    for k in range(num_heads):
        x = h
        for layer in range(num_layers):
            name = block.format(k=k, l=layer)
            x = x + F.silu(F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias")))
        logits.append(F.linear(x, tensors[lm_head.format(k=k, L=num_layers) + ".weight"]))
    return torch.stack(logits)


def save(tensors, folder: Path, kind: str) -> None:
    """Write tensors as one file or two shards of a kind."""
    folder.mkdir(exist_ok=True)
    if kind in ("medusa_lm_head.safetensors", "model.safetensors"):
        save_file(tensors, folder / kind)
    elif kind in ("medusa_lm_head.pt", "pytorch_model.bin"):
        torch.save(tensors, folder / kind)
    else:
        single = kind.removesuffix(".index.json")
        stem, suffix = single.rsplit(".", 1)
        shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
        weight_map = {name: shards[number % 2] for number, name in enumerate(tensors)}
        for shard in shards:
            part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
            save_file(part, folder / shard) if suffix == "safetensors" else torch.save(part, folder / shard)
        (folder / kind).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


WHERE = {
    "v0.1": ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "medusa_lm_head.safetensors.index.json"],
    "vllm": ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
    "merged": ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"],
    "modelopt": ["model.safetensors", "model.safetensors.index.json"],
    "vllm within a model": ["model.safetensors"],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_heads", "num_layers"), [(1, 1), (5, 1), (3, 2)])
@pytest.mark.parametrize(("layout", "kind"), [(layout, kind) for layout, kinds in WHERE.items() for kind in kinds])
def test_format_is_read_without_being_told_which(tmp_path, layout, kind, num_heads, num_layers, bias):
    tensors = tensors_of(layout, num_heads, num_layers, bias)
    around = {} if layout in ("v0.1", "vllm") else {"model.norm.weight": torch.ones(3), "lm_head.weight": torch.ones(2, 2)}
    save({**tensors, **around}, tmp_path, kind)
    assert has_heads(tmp_path)
    heads = load_heads(tmp_path)
    assert (len(heads), heads.num_layers, heads.config.vocab_size) == (num_heads, num_layers, V)
    h = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(heads(h), by_hand(tensors, layout, num_heads, num_layers, h))


def test_one_lm_head_for_all_heads(tmp_path):
    tensors = tensors_of("vllm", 3)
    shared = tensors.pop("lm_heads.0.weight")
    del tensors["lm_heads.1.weight"], tensors["lm_heads.2.weight"]
    save({**tensors, "lm_head.weight": shared}, tmp_path, "model.safetensors")
    heads = load_heads(tmp_path)
    assert all(torch.equal(heads.lm_head(k).weight, shared) for k in range(3))
    save_heads(heads, tmp_path / "ours")  # where each has its own
    assert all(torch.equal(load_heads(tmp_path / "ours").lm_head(k).weight, shared) for k in range(3))


def test_v2_of_tgi_takes_its_vocabulary_from_the_backbone(tmp_path):
    backbone = tiny_backbone()
    heads = random_heads(backbone, shared=True)
    backbone.save_pretrained(tmp_path / "backbone")
    save(dict(heads.state_dict()), tmp_path / "heads", "medusa_lm_head.safetensors")
    (tmp_path / "heads" / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_num_layers": 1, "version": "2"}))
    model = MedusaModel.from_pretrained(tmp_path / "backbone", tmp_path / "heads")
    h = torch.randn(2, 64)
    heads.share(backbone.get_output_embeddings())
    assert torch.equal(model.heads(h), heads(h))
    with pytest.raises(CheckpointError, match="gives vocab_size; name the backbone"):
        load_heads(tmp_path / "heads")


@pytest.mark.parametrize(("claimed", "key"), [(2, "medusa_num_heads"), (9, "num_medusa_heads")])
def test_file_is_believed_over_the_config(tmp_path, claimed, key):
    save(tensors_of(num_heads=5), tmp_path, "medusa_lm_head.pt")
    (tmp_path / "config.json").write_text(json.dumps({key: claimed, "medusa_num_layers": 1}))
    with pytest.warns(UserWarning, match=rf"says {claimed} heads, .*medusa_lm_head.pt holds 5"):
        assert len(load_heads(tmp_path)) == 5


def test_heads_without_the_lm_heads_that_their_config_names_do_not_load_in_silence(tmp_path):
    save_heads(random_heads(tiny_backbone()), tmp_path)
    held = load_file(tmp_path / "medusa_lm_head.safetensors")
    save_file({name: t for name, t in held.items() if ".linear." in name}, tmp_path / "medusa_lm_head.safetensors")
    with pytest.warns(UserWarning, match=r"LM heads of their own, .*safetensors holds none; the backbone's is used"):
        assert load_heads(tmp_path).config.medusa_shared_lm_head


def test_tied_blocks_of_the_old_bug_are_recognised(tmp_path):
    def tied(name):
        return {**tensors, **{f"{k}.1.linear.{kind}": tensors[f"{k}.0.linear.{kind}"] for k in range(2) for kind in KINDS}}[
            name
        ]

    KINDS = ("weight", "bias")
    tensors = tensors_of(num_layers=2)
    names = list(tensors)
    save({name: tied(name) for name in names}, tmp_path / "both", "medusa_lm_head.pt")  # memory shared, as torch.save kept it
    alone = {name: tensors[name] for name in names if ".1.linear" not in name}  # as safetensors kept it
    save(alone, tmp_path / "once", "medusa_lm_head.safetensors")
    with pytest.warns(UserWarning, match="the same one 2 times"):
        once = load_heads(tmp_path / "once")
    both = load_heads(tmp_path / "both")
    h = torch.randn(3, D)
    assert torch.equal(once(h), both(h)) and both.num_layers == once.num_layers == 2
    torch.testing.assert_close(both(h), by_hand({name: tied(name) for name in names}, "v0.1", 2, 2, h))
    with warnings.catch_warnings(record=True):
        assert open_checkpoint(tmp_path / "both").tied_blocks and open_checkpoint(tmp_path / "once").tied_blocks
    save_heads(both, tmp_path / "ours")
    assert torch.equal(load_heads(tmp_path / "ours")(h), both(h))
    save(tensors, tmp_path / "distinct", "medusa_lm_head.pt")
    assert not open_checkpoint(tmp_path / "distinct").tied_blocks


def test_heads_of_several_dtypes_lose_nothing(tmp_path):
    tensors = tensors_of(dtype=torch.bfloat16)
    tensors["0.0.linear.bias"] = torch.full((D,), 1 / 3)
    save(tensors, tmp_path, "medusa_lm_head.safetensors")
    heads = load_heads(tmp_path)
    assert heads.dtype == torch.float32 and torch.equal(heads.state_dict()["0.0.linear.bias"], tensors["0.0.linear.bias"])


def test_heads_in_a_file_larger_than_memory_are_mapped(tmp_path):
    size = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tensors, header, at = tensors_of("merged"), {"model.embed.weight": {"dtype": "BF16", "shape": [size // 2]}}, size
    header["model.embed.weight"]["data_offsets"] = [0, size]
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:  # sparse: the embedding takes no room on the disk
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(size, os.SEEK_CUR)
        file.write(b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
    h = torch.randn(2, D)
    torch.testing.assert_close(load_heads(tmp_path)(h), by_hand(tensors, "merged", 2, 1, h))


@pytest.mark.parametrize("kind", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("prefix", ["medusa_head.", "medusa_heads."])
def test_whole_model_loads_as_backbone_and_heads_without_noise(tmp_path, prefix, kind):
    backbone = tiny_backbone()
    heads = random_heads(backbone)
    backbone.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "whole" / "model.safetensors").unlink()
    save({**tensors, **{prefix + name: t for name, t in heads.state_dict().items()}}, tmp_path / "whole", kind)
    told = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(listener)
    level, logger.level = logger.level, logging.WARNING
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = MedusaModel.from_pretrained(tmp_path / "whole")
    finally:
        logger.removeHandler(listener)
        logger.level = level
    assert told == []
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor)
    prompt = random_prompt(9)
    assert model.generate(prompt, max_new_tokens=20)[0, 9:].tolist() == plain_greedy(backbone, prompt, 20)
    assert torch.equal(model.heads.state_dict()["2.1.weight"], heads.state_dict()["2.1.weight"])


def test_backbone_that_lacks_a_tensor_is_refused(tmp_path):
    tiny_backbone().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file({**tensors, **tensors_of("merged")}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        MedusaModel.from_pretrained(tmp_path)
    tiny_backbone().save_pretrained(tmp_path)
    save_file({**load_file(tmp_path / "model.safetensors"), "x.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_heads(random_heads(tiny_backbone()), tmp_path / "heads")
    with pytest.warns(UserWarning, match="1 tensors in .* have no place in the model: x.weight"):
        MedusaModel.from_pretrained(tmp_path, tmp_path / "heads")


class _Bomb:
    def __reduce__(self):
        return (print, ("code in a pickle ran",))


@pytest.mark.parametrize("how", [torch.save, lambda found, path: path.write_bytes(pickle.dumps(found, protocol=2))])
@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "pytorch_model.bin"])
def test_code_in_a_pickle_is_refused_by_name(tmp_path, capsys, how, name):
    how({"medusa_head.0.0.linear.weight": _Bomb()}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} holds code, (\w+\.)?print, and was not loaded"):
        load_heads(tmp_path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"no pickle", b"\x80\x02.", b""])
def test_file_that_is_no_pickle_is_refused(tmp_path, content):
    (tmp_path / "medusa_lm_head.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="was not loaded"):
        load_heads(tmp_path)


@pytest.mark.parametrize(
    "content", [[1, 2], {1: torch.zeros(2)}, {"0.0.linear.weight": 3}, {"0.1.weight": torch.zeros(2).int()}]
)
def test_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match="expected named tensors"):
        load_heads(tmp_path)


@pytest.mark.parametrize("kept", [-100, 50, 0])
def test_truncated_safetensors_are_refused(tmp_path, kept):
    path = tmp_path / "medusa_lm_head.safetensors"
    save(tensors_of(), tmp_path, path.name)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"medusa_lm_head.safetensors is broken or truncated"):
        load_heads(tmp_path)


def _quantised(tensors):
    tensors["0.0.linear.weight"] = tensors["0.0.linear.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.0.linear.bias"), r"lacks tensor 1.0.linear.bias, expected for 2 heads of 1 layers"),
        (lambda t: t.pop("0.1.weight"), r"has no matrix 0.1.weight"),
        (lambda t: t.pop("0.0.linear.weight"), r"lacks tensor 0.0.linear.weight"),
        (lambda t: t.update({"1.1.weight": torch.zeros(V, D + 1)}), r"1.1.weight has shape \(16, 9\), expected \(16, 8\)"),
        (
            lambda t: t.update({"1.0.linear.weight": torch.zeros(D, V)}),
            r"1.0.linear.weight has shape \(8, 16\), expected \(8, 8\)",
        ),
        (lambda t: t.update({"1.2.weight": t.pop("1.1.weight")}), r"0.1.weight stands where a block would"),
        (lambda t: t.update({"3.1.weight": torch.zeros(V, D)}), r"lacks tensor 2.0.linear.bias, expected for 4 heads"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(D)}), r"holds model.norm.weight; expected names like 0.0.linear"),
        (lambda t: t.update({"lm_heads.0.weight": torch.zeros(V, D)}), r"lm_heads.0.weight, which are names of two formats"),
        (lambda t: t.update({"99999999.0.linear.bias": torch.zeros(D)}), r"names for 100000000 heads"),
        (_quantised, r"tensor 0.0.linear.weight is F8_E4M3, expected unquantised floats of 16 or more bits"),
        (lambda t: t.update({"0.0.linear.input_scale": torch.ones(1)}), r"0.0.linear.input_scale: quantised heads"),
        (lambda t: t.clear(), r"holds no tensors of heads"),
    ],
)
def test_wrong_tensor_is_named(tmp_path, change, message):
    tensors = tensors_of()
    change(tensors)
    save(tensors, tmp_path, "medusa_lm_head.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_heads(tmp_path)


def test_wrong_tensor_is_named_as_the_file_names_it(tmp_path):
    tensors = tensors_of("vllm")
    del tensors["blocks.1.layers.0.weight"]
    save(tensors, tmp_path, "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks tensor blocks.1.layers.0.weight"):
        load_heads(tmp_path)


def test_shards_that_are_not_what_the_index_says_are_named(tmp_path):
    save(tensors_of("merged"), tmp_path, "model.safetensors.index.json")
    second = tmp_path / "model-00002-of-00002.safetensors"
    held = load_file(second)
    save_file({name: held[name] for name in list(held)[1:]}, second)
    with pytest.raises(CheckpointError, match=rf"says that {sorted(held)[0]} is in {second.name}, and it is not"):
        load_heads(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"names the shard {second.name}, which is not there"):
        load_heads(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"medusa_head.0.0.weight": "../x"}}))
    with pytest.raises(CheckpointError, match="expected a file of the same folder"):
        load_heads(tmp_path)


@pytest.mark.parametrize(("hidden", "vocab"), [(32, 64), (64, 65)])
def test_heads_of_another_backbone_are_refused(tmp_path, hidden, vocab):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    save_heads(MedusaHeads(hidden, vocab, 1), tmp_path / "heads")
    with pytest.raises(CheckpointError, match=f"for hidden size {hidden} and {vocab} tokens, the backbone has 64 and 64"):
        MedusaModel.from_pretrained(tmp_path / "backbone", tmp_path / "heads")


def test_folder_without_heads_is_said_to_be_one(tmp_path):
    tiny_backbone().save_pretrained(tmp_path)
    assert not has_heads(tmp_path)
    with pytest.raises(CheckpointError, match="no Medusa heads in"):
        load_heads(tmp_path)


def test_reduced_vocabulary_is_left_to_the_backbone_to_refuse(tmp_path):
    save({**tensors_of("vllm"), "token_map": torch.arange(V)}, tmp_path, "model.safetensors")
    assert load_heads(tmp_path).config.vocab_size == V
