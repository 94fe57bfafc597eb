"""Publishing: a folder of heads, or of a merged model, on the hub."""

from __future__ import annotations

import warnings
from pathlib import Path

from huggingface_hub import HfApi

from medusa.checkpoints.model_card import card_of_heads
from medusa.checkpoints.reader import open_checkpoint
from medusa.errors import CheckpointError, one_line
from medusa.runs.files import PARTIAL, write_text

CARD_FILE = "README.md"
# What a folder of heads is made of; no optimiser states, logs or half-written files of a training.
UPLOADED = ["*.json", "*.safetensors", "*.pt", "*.model", "*.txt", "*.jinja", "*.py", CARD_FILE]
KEPT_BACK = ["*/*", "*" + PARTIAL, "run.json"]


def push_to_hub(
    folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a folder with heads, with a model card where it has none, and return its address.

    Args:
        repo_id: `user/name`; made where it is not there.
        token, endpoint: default: those of huggingface_hub (HF_TOKEN, HF_ENDPOINT).

    Raises:
        CheckpointError: nothing sound to publish there, or the hub refuses it.
    """
    folder = Path(folder)
    checkpoint = open_checkpoint(folder)
    if not (folder / CARD_FILE).is_file():
        merged = checkpoint.format in ("merged", "modelopt")
        about = checkpoint.num_heads, checkpoint.num_layers, checkpoint.shared_lm_head, checkpoint.base_model
        write_text(folder / CARD_FILE, card_of_heads(*about, merged=merged))
    if checkpoint.base_model and Path(checkpoint.base_model).is_dir():
        warnings.warn(
            f"{folder} names the folder {checkpoint.base_model} as its backbone; others will not have it", stacklevel=2
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=UPLOADED,
            ignore_patterns=KEPT_BACK,
            commit_message=f"Medusa heads, {checkpoint.num_heads} of them",
        )
    except Exception as error:  # of the hub, its client and the network
        raise CheckpointError(f"cannot publish {folder} as {repo_id}: {one_line(error)}") from None
    return str(repo)
