"""Models by name: loading them for the commands, and refusing what cannot work before anything is loaded."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

import torch
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from medusa.backbone.lm import max_length_of
from medusa.backbone.ranks import check_shares
from medusa.checkpoints import loading
from medusa.checkpoints.hub import find_heads, find_model
from medusa.checkpoints.quantization import quantized
from medusa.checkpoints.reader import has_heads
from medusa.config import TREE_FILE
from medusa.decoding import check_length
from medusa.errors import InvalidInput
from medusa.model import MedusaModel
from medusa.runs.console import note, waiting
from medusa.trees.files import Tree, load_tree
from medusa.trees.static import MedusaTree

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    model: str,  # a folder, GGUF file, hub id, `smollm2` or `embedded`
    heads: str | None = None,  # folder or hub id of the heads; None: those beside the backbone
    tree: str | None = None,  # see `find_tree`; None: the one beside the heads
    dtype: str | None = None,  # bfloat16, float16 or float32; None: the backbone's own
    device: str | None = None,  # None: a GPU if there is one, else the CPU
    trust_remote_code: bool = False,
    quantization: str = "none",  # see `quantized`
    heads_wanted: bool = True,  # whether a model without heads is refused; otherwise it decodes plainly
    tp: int = 1,  # number of processes that hold a part of the model each (tensor parallel); this must be one of them
) -> MedusaModel:
    """The Medusa model of these names, on its device; MedusaError if something is missing, broken or does not fit together."""
    quiet_transformers()
    source = find_model(model, code=trust_remote_code)
    options = backbone_options(dtype, device, trust_remote_code, quantization)
    if tp > 1:
        del options["device_map"]  # each process takes the GPU of its number
        options["distributed_config"] = DistributedConfig(tp_size=tp)
    found = find_tree(tree)
    plain = require_heads(model, heads, tree == "root" or not heads_wanted)
    with waiting(f"loading {model}"):
        if plain:
            return MedusaModel(loading.load_backbone(source, **options))
        return MedusaModel.from_pretrained(source, heads=heads, tree=found, **options)


def load_backbone(model: str, dtype: str | None, device: str | None, trust_remote_code: bool, quantization: str) -> Any:
    """The backbone alone; the arguments are those of `load_model`."""
    options = backbone_options(dtype, device, trust_remote_code, quantization)
    return loading.load_backbone(find_model(model, code=trust_remote_code), **options)


def backbone_options(dtype: str | None, device: str | None, trust_remote_code: bool, quantization: str) -> dict[str, Any]:
    return {
        "dtype": dtype_named(dtype),
        "device_map": device_named(device),
        "trust_remote_code": trust_remote_code,
        **quantized(quantization, dtype_named(dtype)),
    }


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    quiet_transformers()
    source = find_model(model, code=trust_remote_code)
    with waiting(f"loading the tokenizer of {model}"):
        return loading.load_tokenizer(source, trust_remote_code=trust_remote_code)


def find_tree(name: str | None) -> Tree | None:
    """The tree of a file or preset, or for `root` that of plain decoding; None stays None."""
    if name is None:
        return None
    return MedusaTree([]) if name == "root" else load_tree(name)


def dtype_named(name: str | None) -> torch.dtype | None:
    """A torch dtype by name; None stays None."""
    if name is None:
        return None
    if name not in DTYPES:
        raise InvalidInput(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def device_named(name: str | None) -> str:
    """A device; None: a GPU if there is one, of several processes each its own. InvalidInput if the device is not there."""
    if name is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"device {name!r} is not there: {str(error).splitlines()[0]}") from None
    return name


def require_heads(model: str, heads: str | None, plainly: bool = False) -> bool:
    """Whether decoding is plain, without heads, which must be allowed (`plainly`); nothing is loaded to find out. InvalidInput
    if heads are named or needed, and there are none."""
    if has_heads(find_heads(heads if heads is not None else model)):
        return False
    if plainly and heads is None:
        return True
    raise InvalidInput(
        f"{heads or model} has no Medusa heads; give some with --heads FOLDER, train some (medusa train {model}), or decode "
        "plainly with --tree root"
    )


def require_parts(model: str, tp: int, options: dict[str, Any]) -> None:
    """Refuse to load a model in `tp` parts, one per GPU, before anything is loaded, where that cannot work.

    Args:
        options: those of `load_model`.
    """
    source = find_model(model, code=options["trust_remote_code"])
    if options["quantization"] != "none":
        raise InvalidInput("--tp is for models that are not quantised when loaded; leave --quantization out, or --tp")
    if options["device"] is not None:
        raise InvalidInput("--tp gives each part a GPU of its own, or all the CPU if there is none; leave --device out")
    if torch.cuda.is_available() and torch.cuda.device_count() < tp:
        raise InvalidInput(f"--tp {tp} needs {tp} GPUs, this machine has {torch.cuda.device_count()}; lower --tp")
    check_shares(loading.load_config(source, trust_remote_code=options["trust_remote_code"]), tp)


def check_room(model: str, prompt_tokens: int, max_new_tokens: int, trust_remote_code: bool = False) -> None:
    """Refuse a prompt that is too long before the model is loaded; a GGUF file's config takes too long to read for that."""
    source = find_model(model, code=trust_remote_code)
    if source.gguf_file is None:
        config = loading.load_config(source, trust_remote_code=trust_remote_code)
        check_length(prompt_tokens, max_new_tokens, max_length_of(config), "--max-new-tokens")


def note_advice_on_tree(medusa: MedusaModel, model: str, heads: str | None, tree: str | None) -> None:
    """Note that the tree of a model loaded from these names is, or may be slower than, plain decoding, if nobody chose it."""
    if medusa.heads is None or tree is not None:
        return
    folder, nodes = find_heads(heads if heads is not None else model), len(medusa.tree)
    tuned = _made_with(folder / "tuning.json")
    dtype = str(medusa.backbone.dtype).removeprefix("torch.")
    command = "`medusa tune` finds the fastest on this machine"
    if nodes == 1:
        why = ", as medusa tune chose: no tree paid" if tuned else ""
        note(f"the tree of these heads is the root alone{why}. This is plain decoding; heads trained for longer may pay")
    elif not (folder / TREE_FILE).is_file():
        note(f"these heads have no tree file: a dynamic tree of {nodes} nodes, maybe slower than --tree root; {command}")
    elif tuned and tuned.get("dtype") not in (None, dtype):
        note(f"the tree of these heads was tuned in {tuned['dtype']} and runs in {dtype} now, maybe slower than --tree root")
    elif not tuned and heads is not None:
        note(f"the tree of these heads, {nodes} nodes, is not tuned, maybe slower than --tree root; {command}")


def _made_with(file: Path) -> dict[str, Any]:
    """What `medusa tune` was run with; empty if it was not run."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["made_with"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def quiet_transformers() -> None:
    """Silence transformers' progress bars and advice, which would drown ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel(CRITICAL)  # logs missing kernels at import
    with suppress(ImportError, AttributeError):  # the progress bar of a GGUF file cannot be switched off
        from transformers import modeling_gguf_pytorch_utils as gguf

        gguf.tqdm = lambda tensors, **_: tensors
