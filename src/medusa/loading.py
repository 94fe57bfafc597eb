"""Loading a backbone: transformers does it; here every tensor is accounted for, and an error is one line."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from medusa.checkpoints.names import belongs_to_heads
from medusa.errors import CheckpointError


def load_backbone(folder: str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any) -> PreTrainedModel:
    """A causal LM from a folder, which may hold heads among its tensors.

    Args:
        dtype: default: the backbone's own.
        kwargs: passed on to transformers.

    Raises:
        CheckpointError: no model there, or one that lacks tensors, which transformers would make up at random.
    """
    try:
        with _without_report():
            backbone, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", output_loading_info=True, **kwargs
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"cannot load a causal language model from {folder}: {str(error).splitlines()[0]}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"the model in {folder} lacks {missing[0]} and {len(missing) - 1} other tensors; copy it again")
    unused = sorted(name for name in info["unexpected_keys"] if not belongs_to_heads(name))
    if unused:
        warnings.warn(f"{len(unused)} tensors in {folder} have no place in the model: {unused[0]}, …", stacklevel=2)
    return backbone


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
