"""medusa inspect: the contents of a model folder, a GGUF file, heads or a tree file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, showing
from medusa.cli.tree import figures, show_tree
from medusa.errors import InvalidInput
from medusa.runs.console import note

if TYPE_CHECKING:
    from medusa.checkpoints.hub import Source
    from medusa.checkpoints.reader import Checkpoint
    from medusa.trees.files import Tree

FORMATS = {
    "medusa": "ours, as medusa train writes them",
    "v0.1": "v0.1 (FasterDecoding)",
    "v2": "v2: the LM head is shared (TGI's; also ours with --shared-lm-head)",
    "vllm": "vLLM's",
    "merged": "merged: a backbone and its heads in one model",
    "modelopt": "ModelOpt's",
}


SUFFIXES = (".gguf", ".safetensors", ".pt", ".bin", ".json")


def inspect_command(
    path: Annotated[
        str, typer.Argument(help="A folder, GGUF file or hub id of a model or heads, a tree file, `smollm2` or `embedded`.")
    ],
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Describe a model: its backbone, its heads with their format and sizes, and its tree."""
    record, tree = _found(path, revision)
    if as_json:
        print(json.dumps(record))
        return
    for part, facts in record.items():
        known = {name: value for name, value in facts.items() if value is not False}
        showing.print_facts(
            part, known | ({"format": FORMATS.get(known["format"], known["format"])} if part == "heads" else {})
        )
    if tree is not None:
        show_tree(tree)
    elif "heads" in record:
        note("no tree file beside the heads: a dynamic tree is used; medusa tune finds the fastest tree")
    else:
        note("no heads here: train some with medusa train, and name their folder with --heads")


def _found(path: str, revision: str | None) -> tuple[dict[str, Any], Tree | None]:
    """The facts about what is there, by part, and its tree."""
    from medusa.checkpoints.hub import GGUF, SMOLLM2_HEADS, at, find_model
    from medusa.checkpoints.reader import has_heads, open_checkpoint
    from medusa.config import TREE_FILE
    from medusa.trees.files import load_tree

    file = Path(path)
    if file.is_file() and file.suffix == ".json" and not file.name.endswith(".index.json"):
        tree = load_tree(file)
        return {"tree": figures(tree)}, tree
    backbone, record = None, dict[str, Any]()
    if file.is_file() and file.suffix not in SUFFIXES:
        raise InvalidInput(f"{path} is no model, heads or tree (a folder, or a file in {', '.join(SUFFIXES)})")
    if file.is_file() and file.suffix != GGUF:
        its_heads = file
    elif path in SMOLLM2_HEADS:
        its_heads = SMOLLM2_HEADS[path]
    else:
        source = find_model(at(path, revision))
        its_heads, backbone = source.heads or source.folder, backbone_facts(source)
    if backbone is not None:
        record["backbone"] = backbone
    if backbone is not None and not its_heads.is_file() and not has_heads(its_heads):
        return record, None
    heads = open_checkpoint(its_heads)
    record["heads"] = heads_facts(heads)
    beside = heads.source.parent / TREE_FILE
    if not beside.is_file():
        return record, None
    tree = load_tree(beside)
    return record | {"tree": figures(tree)}, tree


def heads_facts(found: Checkpoint) -> dict[str, Any]:
    config = found.config
    return {
        "format": found.format,
        "file": found.source.name,
        "num_heads": config.medusa_num_heads,
        "num_layers": config.medusa_num_layers,
        "kind": config.medusa_heads_kind,
        "hidden_size": config.hidden_size,
        "vocab_size": found.vocab_size,
        "shared_lm_head": config.medusa_shared_lm_head,
        "draft_vocabulary": config.medusa_draft_vocabulary,
        "lm_head_bias": config.medusa_lm_head_bias,
        "tied_blocks": found.tied_blocks,
        "parameters": sum(tensor.numel() for tensor in found.tensors.values()),
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()})),
        "base_model": config.base_model_name_or_path,
        "notes": list(found.notes),
    }


def backbone_facts(source: Source) -> dict[str, Any] | None:
    """Facts about the model of a folder or a GGUF file; None if there is no model, only heads."""
    if source.gguf_file is not None:
        return {"model": str(source), **gguf_facts(source.folder / source.gguf_file)}
    from medusa.backbone.lm import max_length_of
    from medusa.checkpoints.loading import load_config
    from medusa.checkpoints.names import belongs_to_heads
    from medusa.checkpoints.quantization import quantization_of
    from medusa.config import CONFIG_FILE, read_json_object
    from medusa.errors import CheckpointError

    file, weights = source.folder / CONFIG_FILE, sorted(source.folder.glob("*.safetensors"))
    kind = read_json_object(file).get("model_type") if file.is_file() else None
    if kind in (None, "medusa") or not any(source.folder.glob("*model*")):
        return None
    try:
        config = load_config(source)
    except CheckpointError:  # the model has its own code, which is not run here
        return {"model": str(source), "architecture": kind}
    tokenizer = source.folder / "tokenizer_config.json"
    fields = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "attention_heads": "num_attention_heads"}
    fields |= {"key_value_heads": "num_key_value_heads", "vocab_size": "vocab_size"}
    quantization = quantization_of(config)
    parameters = sum(_sizes(file, lambda name: not belongs_to_heads(name)) for file in weights)
    return {
        "model": str(source),
        "architecture": kind,
        **{name: getattr(config, field, None) for name, field in fields.items()},
        "context": max_length_of(config),
        "parameters": parameters or None if quantization is None else None,  # several may be packed into one number
        "quantization": quantization,
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        "chat_template": (source.folder / "chat_template.jinja").is_file()
        or (tokenizer.is_file() and "chat_template" in read_json_object(tokenizer)),
    }


def _sizes(file: Path, counts: Any) -> int:
    """Number of parameters in the tensors of a safetensors file whose names count; only its header is read."""
    import math

    from safetensors import safe_open

    from medusa.errors import CheckpointError

    try:
        with safe_open(file, "pt") as opened:
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys() if counts(name))  # noqa: SIM118
    except Exception as error:  # safetensors' own errors, not all of which it exports
        raise CheckpointError(f"{file} is broken or not a safetensors file: {error}") from None


def gguf_facts(file: Path) -> dict[str, Any]:
    """Facts about the model of a GGUF file.

    Raises:
        InvalidInput: the package that reads it is missing.
        CheckpointError: it is broken.
    """
    from medusa.errors import CheckpointError
    from medusa.runs.extras import require

    try:
        reader = require("gguf", "gguf", f"the GGUF file {file}").GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{file} is broken or not a GGUF file: {error}") from None

    def value(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    kind = value("general.architecture")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    types = sorted({tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1})
    return {
        "file": f"{file.name}, {file.stat().st_size / 1e6:.0f} MB",
        "architecture": kind,
        "num_layers": value(f"{kind}.block_count"),
        "hidden_size": value(f"{kind}.embedding_length"),
        "attention_heads": value(f"{kind}.attention.head_count"),
        "key_value_heads": value(f"{kind}.attention.head_count_kv"),
        "vocab_size": None if tokens is None else len(tokens.data),
        "context": value(f"{kind}.context_length"),
        "parameters": sum(int(tensor.n_elements) for tensor in reader.tensors),
        "dtype": ", ".join(types),
        "unpacked_to": "bfloat16, unless --dtype is given",
        "chat_template": reader.get_field("tokenizer.chat_template") is not None,
    }
