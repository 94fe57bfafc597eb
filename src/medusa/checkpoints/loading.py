"""Loading a backbone and its tokenizer through transformers, with every tensor accounted for and errors of one line."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from medusa.checkpoints.adapter import load_adapter
from medusa.checkpoints.gguf import reading_once
from medusa.checkpoints.hub import Source
from medusa.checkpoints.names import belongs_to_heads
from medusa.checkpoints.quantization import BITS, quantize_dynamic
from medusa.checkpoints.tensors import check_tensors
from medusa.config import CONFIG_FILE, MODEL_FILES, read_json_object
from medusa.errors import CheckpointError, InvalidInput, one_line
from medusa.runs.extras import require
from medusa.runs.files import read_json, read_text

GENERATION_CONFIG = "generation_config.json"
# The usual files of a tokenizer; others, of unusual tokenizers, are not checked.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)


def load_backbone(
    source: Source | str | Path, dtype: torch.dtype | str | None = None, adapters: Sequence[Path] = (), **kwargs: Any
) -> PreTrainedModel:
    """Load a causal LM from a folder, whose tensors may include heads, or from a GGUF file, whose weights are unpacked.

    Args:
        source: result of `find_model`, or a folder.
        dtype: dtype of the weights; default: the backbone's own, or bfloat16 for a GGUF file.
        adapters: folders of adapters to load, one after the other (`load_adapter`).
        kwargs: further options of transformers' `from_pretrained`. The `quantization_config` "int8-dynamic" or "int4-dynamic"
            is ours: the loaded model is quantised after the adapters are merged into it (`quantize_dynamic`).

    Raises:
        CheckpointError: there is no model, a file is broken, or tensors are missing or of the wrong shape, which transformers
            would initialise at random.
        InvalidInput: a GGUF file while the package that reads it is missing, or a model to be quantised again.
    """
    source = source if isinstance(source, Source) else Source(Path(source))
    folder = source.folder
    kind = kwargs.get("quantization_config")
    bits = BITS.get(kind) if isinstance(kind, str) else None  # configs of transformers have no hash
    if bits is not None:
        kwargs = {name: value for name, value in kwargs.items() if name != "quantization_config"}
    if source.gguf_file is not None:
        if "quantization_config" in kwargs:
            raise InvalidInput(
                f"{source.gguf_file} is unpacked when loaded and cannot be quantised in the same step; write it as a folder "
                "first (medusa convert HEADS OUT --to merged --backbone FILE.gguf) and quantise that"
            )
        dtype, kwargs = dtype or torch.bfloat16, _gguf_options(source) | kwargs
    configs = [read_json_object(folder / name) for name in (CONFIG_FILE, GENERATION_CONFIG) if (folder / name).exists()]
    if bits is not None and any("quantization_config" in config for config in configs):
        raise InvalidInput(f"{source} is quantised already and cannot be {kind} as well; leave --quantization out")
    options = {**kwargs, "ignore_mismatched_sizes": True}  # reported below, by name
    try:
        with _without_report(), _reading(source):
            backbone, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", output_loading_info=True, **options
            )
    except Exception as error:  # transformers, its config classes and remote code raise errors of many kinds
        weights = next((folder / name for name in MODEL_FILES if (folder / name).exists()), None)
        if weights is not None:
            check_tensors(weights)  # names the file if it is broken
        raise CheckpointError(f"cannot load a causal language model from {source}: {one_line(error)}") from error
    if source.name is not None or source.gguf_file is not None:
        backbone.config._name_or_path = str(source)  # transformers sets the model that a GGUF file was made from
    _account_for(info, folder)
    for adapter in adapters:
        load_adapter(backbone, adapter)
    if bits is not None:
        quantize_dynamic(backbone, bits)
    return backbone


def _account_for(info: dict[str, Any], folder: Path) -> None:
    """Refuse a model some of whose tensors are missing or of the wrong shape; warn of tensors that have no place."""
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"the model in {folder} lacks {missing[0]} and {len(missing) - 1} other tensors; copy it again")
    if mismatched := sorted(info["mismatched_keys"]):
        name, got, wanted = mismatched[0][:3]
        raise CheckpointError(
            f"the model in {folder} has a {name} of shape {tuple(got)}, {CONFIG_FILE} says {tuple(wanted)}; "
            f"{len(mismatched) - 1} other tensors differ as well; take both from one model"
        )
    if unused := sorted(name for name in info["unexpected_keys"] if not belongs_to_heads(name)):
        warnings.warn(f"{len(unused)} tensors in {folder} have no place in the model: {unused[0]}, …", stacklevel=3)


def load_tokenizer(source: Source | str | Path, **kwargs: Any) -> Any:
    """Load the tokenizer of a model, including its chat template.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
        InvalidInput: it is in a GGUF file while the package that reads it is missing.
    """
    source = source if isinstance(source, Source) else Source(Path(source))
    if source.gguf_file is not None:
        kwargs["gguf_file"] = _gguf_options(source)["gguf_file"]
    try:
        with _reading(source):
            return AutoTokenizer.from_pretrained(source.folder, **kwargs)
    except Exception as error:  # from Rust, sentencepiece or remote code
        files = [file for name in TOKENIZER_FILES for file in sorted(source.folder.glob(name))]
        for file in files:
            if file.suffix == ".json":
                read_json(file, CheckpointError)
            elif file.suffix != ".model":
                read_text(file, CheckpointError)
        held = ", ".join(file.name for file in files) or "which has no tokenizer files"
        raise CheckpointError(f"cannot load a tokenizer from {source} ({held}): {one_line(error)}") from error


def load_config(source: Source | str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Load the config of a model's text part, without the weights; CheckpointError if there is none that can be read."""
    source = source if isinstance(source, Source) else Source(Path(source))
    where = {"gguf_file": source.gguf_file} if source.gguf_file is not None else {}
    try:
        with _reading(source):
            return AutoConfig.from_pretrained(source.folder, **where, **kwargs).get_text_config(decoder=True)
    except Exception as error:  # config classes and remote code raise errors of many kinds
        raise CheckpointError(f"cannot read the config of {source}: {one_line(error)}") from error


def _gguf_options(source: Source) -> dict[str, Any]:
    """transformers' options for reading a GGUF file and unpacking its weights."""
    require("gguf", "gguf", f"the GGUF file {source}")
    options: dict[str, Any] = {"gguf_file": source.gguf_file}
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers before 5.20 always unpacks
        return options
    return options | {"quantization_config": GgufConfig(dequantize=True)}


def _reading(source: Source) -> AbstractContextManager[None]:
    return nullcontext() if source.gguf_file is None else reading_once()


@contextmanager
def _without_report() -> Iterator[None]:
    """Suppress transformers' own report of unexpected tensors in this thread: heads among a model's tensors are expected."""
    thread, logger = threading.get_ident(), logging.getLogger("transformers.modeling_utils")

    def shown(record: logging.LogRecord) -> bool:
        return record.thread != thread or "LOAD REPORT" not in record.getMessage()

    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)
