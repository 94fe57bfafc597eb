"""The hub: a local folder, or a hub id fetched into the local cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from medusa.errors import CheckpointError

# Weights as safetensors, configs, tokenizers, and old Medusa heads; no code.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "medusa_lm_head.pt"]
PICKLES = ["pytorch_model*.bin"]  # of models that have nothing else


def local_folder(name: str | Path) -> Path:
    """The folder of a model: itself if it exists, else a hub id's download.

    Raises:
        CheckpointError: neither a folder nor a model that can be fetched.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=PATTERNS))
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.pt")):
            snapshot_download(str(name), allow_patterns=PICKLES)
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name} is no folder here and cannot be fetched from the hub: {reason}") from None
