"""Provenance: versions, machine and weights behind a figure, so that it can be reproduced."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from medusa import __version__
from medusa.placement import weights_of


def environment(device: torch.device) -> dict[str, Any]:
    """The versions and the machine details that affect speed."""
    found = {
        "medusa": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def made_by(model: Any) -> dict[str, Any]:
    """The dtype and the weights of a `MedusaModel`, and its machine."""
    return {
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "backbone": fingerprint(model.backbone),
        "heads": fingerprint(model.heads) if model.heads is not None else None,
        **environment(model.device),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's weights (a sample and the dtype of each) and, for a transformers model, its config."""
    config = module.config.to_dict() if isinstance(module, PreTrainedModel) else {}
    lasting = {key: value for key, value in config.items() if not key.startswith(("_", "transformers_version"))}
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:  # offloaded: loaded for a moment
            owner, _, own = name.rpartition(".")
            with weights_of(module.get_submodule(owner)):
                tensor = getattr(module.get_submodule(owner), own)
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
