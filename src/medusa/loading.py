"""Loading a backbone and its tokenizer: transformers does it; here every tensor is accounted for, an error is one line."""

from __future__ import annotations

import importlib.util
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from medusa.checkpoints.names import belongs_to_heads
from medusa.errors import CheckpointError, InvalidInput
from medusa.hub import Source

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError)


def load_backbone(source: Source | str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any) -> PreTrainedModel:
    """A causal LM from a folder, which may hold heads among its tensors, or from a GGUF file, whose weights are unpacked.

    Args:
        source: what `find_model` found, or a folder.
        dtype: default: the backbone's own; bfloat16 for a GGUF file.
        kwargs: passed on to transformers.

    Raises:
        CheckpointError: no model there, or one that lacks tensors, which transformers would make up at random.
        InvalidInput: a GGUF file, and the package that reads it is missing, or it is to be quantised once more.
    """
    source = source if isinstance(source, Source) else Source(Path(source))
    folder = source.folder
    if source.gguf_file is not None:
        if "quantization_config" in kwargs:
            raise InvalidInput(
                f"{source.gguf_file} is unpacked when loaded, which leaves no step to quantise it again; write it as a folder "
                "first (medusa convert HEADS OUT --to merged --backbone FILE.gguf) and quantise that"
            )
        dtype, kwargs = dtype or torch.bfloat16, _gguf_options(source) | kwargs
    try:
        with _without_report():
            backbone, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", output_loading_info=True, **kwargs
            )
    except LOADING_ERRORS as error:
        raise CheckpointError(f"cannot load a causal language model from {source}: {str(error).splitlines()[0]}") from error
    if source.name is not None or source.gguf_file is not None:
        backbone.config._name_or_path = str(source)  # GGUF files name the model that they were made from
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"the model in {folder} lacks {missing[0]} and {len(missing) - 1} other tensors; copy it again")
    unused = sorted(name for name in info["unexpected_keys"] if not belongs_to_heads(name))
    if unused:
        warnings.warn(f"{len(unused)} tensors in {folder} have no place in the model: {unused[0]}, …", stacklevel=2)
    return backbone


def load_tokenizer(source: Source | str | Path, **kwargs: Any) -> Any:
    """The tokenizer of a model, its chat template with it.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        InvalidInput: it is in a GGUF file, and the package that reads it is missing.
    """
    source = source if isinstance(source, Source) else Source(Path(source))
    if source.gguf_file is not None:
        kwargs["gguf_file"] = _gguf_options(source)["gguf_file"]
    try:
        return AutoTokenizer.from_pretrained(source.folder, **kwargs)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"cannot load a tokenizer from {source}: {str(error).splitlines()[0]}") from error


def _gguf_options(source: Source) -> dict[str, Any]:
    """What transformers is to be told to read a GGUF file and unpack its weights, once."""
    if importlib.util.find_spec("gguf") is None:
        raise InvalidInput(f"{source} is a GGUF file, which needs the package gguf: pip install 'medusa-decoding[gguf]'")
    options: dict[str, Any] = {"gguf_file": source.gguf_file}
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers of before 5.20 always unpacks
        return options
    return options | {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers' own table of tensors without a place, of this thread: a model's heads are no news."""
    thread, logger = threading.get_ident(), logging.getLogger("transformers.modeling_utils")

    def keeps(record: logging.LogRecord) -> bool:
        return record.thread != thread or "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)
