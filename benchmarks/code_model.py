"""A code model's beginnings: a random Llama with its tokenizer, and the Python source installed here as tokens.

    python benchmarks/code_model.py FOLDER --size 100m

Writes `random/` (the model), `train.jsonl` and `seeds.jsonl` (from training files), `calibration.jsonl` and `test.jsonl`
(prompts from held-out files, one per file). About one file in fifty is held out, chosen by a hash of its name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
FEWEST, MOST, LONGEST_LINE = 300, 300_000, 1000  # characters: other files are stubs, tables and generated code
TOKENIZER_BYTES = 40_000_000
OF_PACKAGES = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    attention_heads: int
    vocabulary: int = 16384
    length: int = 1024  # tokens per row
    prompt: int = 256  # tokens
    seed: int = 128  # tokens
    most_bytes: int = 200_000_000  # of source
    held_out_of: int = 50  # one file in this many is held out


SIZES = {
    "100m": Size(768, 2048, 12, 12),
    "400m": Size(1024, 2816, 24, 16),
    "toy": Size(32, 64, 2, 2, vocabulary=384, length=64, prompt=12, seed=8, most_bytes=400_000, held_out_of=6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--source", type=Path, nargs="+", help="folders of Python files [all that are installed]")
    args = parser.parse_args()
    size, folders = SIZES[args.size], args.source or installed()
    parts: dict[str, list[str]] = {"train": [], "calibration": [], "test": []}
    for digest, text in documents(folders, size.most_bytes):
        parts[split(digest, size.held_out_of)].append(text)
    if not all(parts.values()):
        counts = ", ".join(f"{len(texts)} for {name}" for name, texts in parts.items())
        sys.exit(f"error: too few Python files in {', '.join(map(str, folders))} ({counts}); give others as --source")
    args.folder.mkdir(parents=True, exist_ok=True)
    write(args.folder, size, parts)


def installed() -> list[Path]:
    """The folders of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    found = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    return [Path(path) for path in dict.fromkeys(found) if Path(path).is_dir()]


def documents(folders: Sequence[Path], most_bytes: int) -> Iterator[tuple[int, str]]:
    """(hash of its name, text) of different files, in the order of the hashes, up to a total size in bytes."""
    names = {}
    for folder in folders:
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder)
            if not OF_PACKAGES.intersection(relative.parts):  # these are folders of their own
                names[int(hashlib.sha256(str(relative).encode()).hexdigest(), 16)] = path
    seen, size = set(), 0
    for digest in sorted(names):
        try:
            text = names[digest].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a dangling link; test data in another encoding
            continue
        if not FEWEST < len(text) < MOST or max(map(len, text.splitlines())) > LONGEST_LINE:
            continue
        content = hashlib.sha256("".join(text.split()).encode()).digest()  # copies may differ in white space
        if content not in seen:
            seen.add(content)
            yield digest, text
            size += len(text)
        if size >= most_bytes:
            return


def split(digest: int, held_out_of: int) -> str:
    if digest % held_out_of:
        return "train"
    return "calibration" if digest // held_out_of % 2 else "test"


def write(folder: Path, size: Size, parts: dict[str, list[str]]) -> None:
    share = max(1, sum(map(len, parts["train"])) // TOKENIZER_BYTES)
    tokenizer = train_tokenizer(parts["train"][::share], size.vocabulary)
    tokenizer.save_pretrained(folder / "random")
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.attention_heads,
        max_position_embeddings=max(size.length, 512),  # `medusa tune` times steps behind the prompts
        bos_token_id=end,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = end
    model.save_pretrained(folder / "random")

    encoded = {name: encode(tokenizer, texts) for name, texts in parts.items()}
    tokens = [token for ids in encoded["train"] for token in (*ids, end)]
    rows = [tokens[start : start + size.length] for start in range(0, len(tokens) - size.length + 1, size.length)]
    save(folder / "train.jsonl", rows)
    save(folder / "seeds.jsonl", (row[: size.seed] for row in rows))
    for name in ("calibration", "test"):
        # From the middle of a file, since imports are alike everywhere.
        starts = [(ids, (len(ids) - size.prompt) // 2) for ids in encoded[name]]
        save(folder / f"{name}.jsonl", (ids[start : start + size.prompt] for ids, start in starts if start > 0))


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    return [encoded.ids for encoded in tokenizer.backend_tokenizer.encode_batch_fast(texts)]


def save(path: Path, rows: Iterable[Sequence[int]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"input_ids": list(row)}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
