"""Publishing a folder of heads, or a merged model, on the hub."""

from __future__ import annotations

import warnings
from pathlib import Path

from huggingface_hub import HfApi

from medusa.checkpoints.model_card import card_of_heads
from medusa.checkpoints.reader import open_checkpoint
from medusa.errors import CheckpointError, one_line
from medusa.runs.files import PARTIAL, write_text

CARD_FILE = "README.md"
# The files of heads; not a training run's optimiser states, logs or half-written files.
UPLOADED = ["*.json", "*.safetensors", "*.pt", "*.model", "*.txt", "*.jinja", "*.py", CARD_FILE]
KEPT_BACK = ["*/*", "*" + PARTIAL, "run.json"]


def push_to_hub(
    folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a folder with heads, adding a model card if it has none, and return its URL.

    Args:
        repo_id: `user/name`; created if it does not exist.
        token, endpoint: the hub's access token and URL; default: those of huggingface_hub (HF_TOKEN, HF_ENDPOINT).

    Raises:
        CheckpointError: the folder holds no valid heads, or the hub refuses the upload.
    """
    folder = Path(folder)
    checkpoint = open_checkpoint(folder)
    if not (folder / CARD_FILE).is_file():
        merged = checkpoint.format in ("merged", "modelopt")
        write_text(folder / CARD_FILE, card_of_heads(checkpoint.config, merged=merged))
    if (base := checkpoint.config.base_model_name_or_path) and Path(base).is_dir():
        warnings.warn(f"{folder} names the local folder {base} as its backbone, which others do not have", stacklevel=2)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=UPLOADED,
            ignore_patterns=KEPT_BACK,
            commit_message=f"{checkpoint.num_heads} Medusa heads",
        )
    except Exception as error:  # from the hub, its client or the network
        raise CheckpointError(f"cannot publish {folder} as {repo_id}: {one_line(error)}") from None
    return str(repo)
