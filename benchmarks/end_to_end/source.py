"""Source: the Python files that are installed here, split into training and held-out files, as tokens."""

from __future__ import annotations

import hashlib
import json
import site
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from end_to_end.work import Size, Work
from medusa.errors import InvalidInput

TRAIN, HELD_OUT, TOKENIZER = "train.bin", "held_out.jsonl", "tokenizer"
END = "<|endoftext|>"
KEPT_OF_HELD_OUT = 2048  # tokens of a held-out file
FEWEST, MOST, LONGEST_LINE = 300, 300_000, 1000  # characters: others are stubs, tables and generated code
TOKENIZER_BYTES = 40_000_000
STANDARD_LIBRARY, OF_PACKAGES = "Python standard library", {"site-packages", "dist-packages"}


class Document(NamedTuple):
    """A file; its name is relative to the folder that is searched."""

    name: str
    package: str
    text: str
    digest: int  # of its name

    def split(self, held_out_of: int) -> str:
        if self.digest % held_out_of:
            return "train"
        return "calibration" if self.digest // held_out_of % 2 else "test"


def installed() -> list[Path]:
    """The folders of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    found = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    return [Path(path) for path in dict.fromkeys(found) if Path(path).is_dir()]


def documents(folders: Sequence[Path], most_bytes: int) -> Iterator[Document]:
    """Different files in an order that their names' hashes give, until there are so many bytes."""
    names = {}  # by hash
    for folder in folders:
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder)
            if not OF_PACKAGES.intersection(relative.parts):  # searched by themselves
                names[int(hashlib.sha256(str(relative).encode()).hexdigest(), 16)] = folder, relative
    seen, size = set(), 0
    standard = Path(sysconfig.get_paths()["stdlib"])
    for digest in sorted(names):
        folder, relative = names[digest]
        try:
            text = (folder / relative).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a dangling link; test data in other encodings
            continue
        if not FEWEST < len(text) < MOST or max(map(len, text.splitlines())) > LONGEST_LINE:
            continue
        content = hashlib.sha256("".join(text.split()).encode()).digest()  # copies that differ in white space are copies
        if content in seen:
            continue
        seen.add(content)
        package = STANDARD_LIBRARY if folder == standard else folder.name
        if package in OF_PACKAGES:
            package = relative.parts[0].removesuffix(".py")
        yield Document(str(relative), package, text, digest)
        size += len(text)
        if size >= most_bytes:
            return


def train_tokenizer(texts: Iterator[str], size: Size) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def source(work: Work, folders: Sequence[Path]) -> dict[str, Any]:
    """The stage: tokenizer, training tokens and held-out files on the disk."""
    parts: dict[str, list[Document]] = {"train": [], "calibration": [], "test": []}
    for document in documents(folders, work.size.most_bytes):
        parts[document.split(work.size.held_out_of)].append(document)
    training = parts.pop("train")
    share = max(1, sum(len(document.text) for document in training) // TOKENIZER_BYTES)
    if not training:
        raise InvalidInput(f"no Python files in {', '.join(map(str, folders))}; give others as --source")
    tokenizer = train_tokenizer((document.text for document in training[::share]), work.size)
    tokenizer.save_pretrained(work.folder / TOKENIZER)
    tokens = 0
    with (work.folder / TRAIN).open("wb") as file:
        for first in range(0, len(training), 1000):
            texts = [document.text for document in training[first : first + 1000]]
            for encoded in tokenizer.backend_tokenizer.encode_batch_fast(texts):
                ids = np.array([*encoded.ids, tokenizer.eos_token_id], dtype=np.uint16)
                ids.tofile(file)
                tokens += len(ids)
    with (work.folder / HELD_OUT).open("w", encoding="utf-8") as file:
        for split, held_out in parts.items():
            for document in held_out:
                ids = tokenizer.backend_tokenizer.encode(document.text).ids[:KEPT_OF_HELD_OUT]
                file.write(json.dumps({"source": document.name, "split": split, "input_ids": ids}) + "\n")
    for split in parts:
        if not held_out_prompts(work, split, 1):
            raise InvalidInput(f"none of the {len(parts[split])} files held out for {split} is long enough; give more --source")
    if tokens < 2 * work.size.batch_size * work.size.length:
        raise InvalidInput(f"{len(training)} files of Python have {tokens} tokens, too few for a batch; give more --source")
    sizes = Counter[str]()
    for document in training:
        sizes[document.package] += len(document.text)
    return {
        "files": len(training),
        "held_out_files": {split: len(held_out) for split, held_out in parts.items()},
        "characters": sizes.total(),
        "tokens": tokens,
        "packages": [
            {"package": name, "licence": licence, "characters": sizes[name]}
            for name, licence in sorted(licences(sizes).items(), key=lambda item: -sizes[item[0]])
        ],
    }


def licences(packages: Counter[str]) -> dict[str, str]:
    """What each package's metadata say of its licence."""
    owners = metadata.packages_distributions()
    found = {}
    for package in packages:
        said = "PSF-2.0" if package == STANDARD_LIBRARY else "unknown"
        for owner in owners.get(package, [])[:1]:
            about = metadata.metadata(owner)
            classified = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
            stated = next(iter((about.get("License") or "").strip().splitlines()), "")[:60]
            said = about.get("License-Expression") or "; ".join(classified) or stated or said
        found[package] = said
    return found


def held_out_prompts(work: Work, split: str, number: int) -> list[Tensor]:  # each (P,) long
    """Prompts from held-out files that go on for as long as an answer takes, one of a file."""
    size, prompts = work.size, []
    for ids in held_out_ids(work, split):
        start = (len(ids) - size.prompt - size.new) // 2  # not the imports, which are alike everywhere
        if start >= 0:
            prompts.append(torch.tensor(ids[start : start + size.prompt]))
    return prompts[:number]


def held_out_ids(work: Work, split: str) -> Iterator[list[int]]:
    with (work.folder / HELD_OUT).open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            if record["split"] == split:
                yield record["input_ids"]


def training_tokens(work: Work) -> np.memmap:
    return np.memmap(work.folder / TRAIN, dtype=np.uint16, mode="r")
