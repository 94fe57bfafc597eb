"""Conversion: heads from any format to any other, and backbone and heads merged into one model."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from medusa.checkpoints.adapter import ADAPTER_FILES, adapted_model, has_adapter
from medusa.checkpoints.hub import SMOLLM2_HEADS, Source, find_heads, find_model
from medusa.checkpoints.loading import load_backbone, load_tokenizer
from medusa.checkpoints.publish import CARD_FILE
from medusa.checkpoints.quantization import quantized
from medusa.checkpoints.reader import Checkpoint, load_heads, open_checkpoint
from medusa.checkpoints.writer import check_request, copy_beside, wants_lm_head, write_checkpoint
from medusa.config import CONFIG_FILE, INDEX, MODEL_FILES, SAFETENSORS, TREE_FILE, read_json_object
from medusa.errors import InvalidInput


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    backbone: str | None = None,
    quantization: str = "none",
    **kwargs: Any,
) -> Checkpoint:
    """Convert the heads of a folder, file or hub id to another format in a new folder, together with their tree.

    Args:
        to: one of `writer.FORMATS`; `merged` is the whole model, with the adapter of Medusa-2 added to its weights.
        backbone: folder or hub id; default: the source if it holds a backbone, otherwise the one its configuration names.
        quantization: of the backbone in a merged model; see `quantized`.
        kwargs: options for loading the backbone, if it has to be loaded (`trust_remote_code`).
    """
    output = Path(output)
    check_request(output, to)
    if quantization != "none" and to != "merged":
        raise InvalidInput(f"{to} holds no backbone to quantise; write --to merged, or leave --quantization out")
    how = quantized(quantization)
    path = Path(source) if Path(source).is_file() else find_heads(source)
    folder = path.parent if path.is_file() else path
    checkpoint = open_checkpoint(path)
    config = read_json_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {"model_type": "medusa"}
    alone = config.get("model_type") == "medusa" or not any((folder / name).is_file() for name in MODEL_FILES)  # no backbone
    base_model = backbone or (
        checkpoint.config.base_model_name_or_path if alone else str(source if path.is_file() else find_model(source))
    )
    needs_lm_head = wants_lm_head(checkpoint.config.medusa_shared_lm_head, to)
    base = None
    if needs_lm_head or checkpoint.vocab_size is None or to == "merged":
        if base_model is None:
            raise InvalidInput(f"{to} needs the backbone of these heads, and {folder} does not name it; pass --backbone")
        here = backbone is None and str(source) in ("smollm2", *SMOLLM2_HEADS)  # the heads of the installed model
        base = find_model("smollm2" if here else base_model, code=bool(kwargs.get("trust_remote_code")))
    heads = load_heads(path, backbone=None if base is None else base.folder)
    adapter = has_adapter(folder) and alone
    if adapter and to not in ("medusa", "merged"):
        message = f"the heads need a backbone that has the adapter in {folder} merged into it; use --to merged"
        warnings.warn(message, stacklevel=2)
    names = [TREE_FILE, *([CARD_FILE] if alone else []), *(ADAPTER_FILES if adapter and to == "medusa" else [])]
    beside = [folder / name for name in names if (folder / name).is_file()]

    held = None if base is None else _Backbone(base, folder if adapter else None, how | kwargs)
    if to == "merged" and held is not None and held.changed:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent) as saved:
            held.save(Path(saved))
            write_checkpoint(heads, output, to, base_model, backbone=Path(saved), beside=beside)
    else:
        lm_head = held.load().get_output_embeddings() if held is not None and needs_lm_head else None
        write_checkpoint(heads, output, to, base_model, lm_head, None if base is None else base.folder, beside)
    return open_checkpoint(output)


class _Backbone:
    """A backbone in a folder, with the adapter beside the heads, if any; `options` are those of `load_backbone`."""

    def __init__(self, base: Source, adapter: Path | None, options: dict[str, Any]) -> None:
        self.base, self.adapter, self.options = base, adapter, options
        name = adapted_model(base.folder)  # of the model under it, if its folder holds only an adapter
        self.under = None if name is None else find_model(name, code=bool(options.get("trust_remote_code")))

    @property
    def changed(self) -> bool:
        """Whether the model differs from the weights in its folder."""
        whole = any((self.base.folder / name).is_file() for name in (SAFETENSORS, SAFETENSORS + INDEX))
        return not whole or self.adapter is not None or "quantization_config" in self.options

    def load(self) -> PreTrainedModel:
        adapters = [*([self.base.folder] if self.under is not None else []), *([self.adapter] if self.adapter else [])]
        return load_backbone(self.under or self.base, adapters=adapters, **self.options)

    def save(self, folder: Path) -> None:
        for each in filter(None, (self.under, self.base)):
            copy_beside(each.folder, folder)
        self.load().save_pretrained(folder)
        if self.base.gguf_file is not None:
            load_tokenizer(self.base).save_pretrained(folder)
