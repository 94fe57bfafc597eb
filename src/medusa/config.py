"""Configuration: the description saved with heads, dataclasses of options, and the strict reader of every configuration."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from medusa.errors import CheckpointError, ConfigError, InvalidInput
from medusa.runs.files import read_json, write_json

T = TypeVar("T")

CONFIG_FILE = "config.json"
HEADS_FILE, OLD_HEADS_FILE = "medusa_lm_head.safetensors", "medusa_lm_head.pt"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"  # suffix of the index of a sharded file: {"weight_map": {tensor: file}}
# Files that may contain heads, in order of preference: files of heads alone, then a model's, in one file or in shards.
HEADS_FILES = (HEADS_FILE, HEADS_FILE + INDEX, OLD_HEADS_FILE)
MODEL_FILES = (SAFETENSORS, SAFETENSORS + INDEX, PICKLE, PICKLE + INDEX)
TREE_FILE = "medusa_tree.json"
HeadsKind = Literal["medusa", "root", "path"]
Quantization = Literal["none", "nf4", "int8", "int8-dynamic", "int4-dynamic"]  # of the backbone: see `quantized`


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """The sizes of a set of heads, and the backbone they were trained on.

    >>> MedusaConfig(hidden_size=8, vocab_size=16, medusa_num_heads=2).to_dict()["num_medusa_heads"]
    2
    """

    hidden_size: int
    vocab_size: int
    medusa_num_heads: int = 5
    medusa_num_layers: int = 1
    medusa_shared_lm_head: bool = False  # the heads predict through the backbone's LM head
    medusa_lm_head_bias: bool = False
    medusa_draft_vocabulary: int | None = None  # number of tokens that heads score; None: all
    medusa_heads_kind: HeadsKind = "medusa"  # what heads read besides the hidden state: nothing, the root, the path from it
    medusa_embedding_size: int | None = None  # the width of the backbone's embeddings, if heads read tokens
    medusa_embedding_scale: float | None = None  # which brings the embeddings to the size of the hidden states
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        kind, reads = self.medusa_heads_kind, self.medusa_heads_kind != "medusa"
        least = {"hidden_size": 1, "vocab_size": 1, "medusa_num_heads": 1, "medusa_num_layers": int(reads)}
        for name, number in least.items():
            if getattr(self, name) < number:
                why = f": heads that read the {kind} read it in a residual block" if number and "layers" in name else ""
                raise InvalidInput(f"{name.removeprefix('medusa_')} is {getattr(self, name)}, expected at least {number}{why}")
        if not 1 <= self.scored <= self.vocab_size:
            raise InvalidInput(f"a draft vocabulary has 1 to {self.vocab_size} tokens, the vocabulary's, got {self.scored}")
        settled = {
            "medusa_lm_head_bias": self.medusa_lm_head_bias and not self.medusa_shared_lm_head,
            "medusa_embedding_size": (self.medusa_embedding_size or self.hidden_size) if reads else None,
            "medusa_embedding_scale": (self.medusa_embedding_scale or 1.0) if reads else None,
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @property
    def scored(self) -> int:
        """Number of tokens that each head scores."""
        return self.vocab_size if self.medusa_draft_vocabulary is None else self.medusa_draft_vocabulary

    def to_dict(self) -> dict[str, Any]:
        """The mapping written to `config.json`, which engines that know Medusa's older formats can read too.

        It has no `architectures` key on purpose: TGI treats a folder with one as a whole model.
        """
        fields = dataclasses.asdict(self)
        legacy = {"model_type": "medusa", "num_medusa_heads": self.medusa_num_heads, "medusa_fc_bias": True}
        if self.medusa_shared_lm_head and self.medusa_heads_kind == "medusa":  # TGI reads no other kind
            legacy["version"] = "2"
        return {**legacy, **fields}

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / CONFIG_FILE, self.to_dict(), sort_keys=True)

    @classmethod
    def load(cls, folder: str | Path) -> MedusaConfig:
        """Read `config.json`, ignoring unknown keys, since other tools share the file; CheckpointError if it lacks a size."""
        path = Path(folder) / CONFIG_FILE
        found = read_json_object(path)
        missing = [name for name in ("hidden_size", "vocab_size", "medusa_num_heads") if name not in found]
        if missing:
            raise CheckpointError(f"{path} lacks {', '.join(missing)}; it does not describe Medusa heads")
        known = {field.name for field in dataclasses.fields(cls)}
        return from_mapping(cls, {key: value for key, value in found.items() if key in known}, str(path))


def option(default: Any, text: str, **more: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        text: its description, for `--help` and the documents.
        more: limits of its values (`least`, `above`, `most`, `below`), or its `choices`; of a tuple those of each value. For
            the command line (`medusa.cli.common`) its `flags`, if they are not made from its name.
    """
    return dataclasses.field(default=default, metadata={"help": text, **more})


LIMITS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def check_options(options: Any, of: str = "") -> None:
    """Raise InvalidInput unless the values of a dataclass of options, which are `of` something, are finite, within their limits
    and among their choices."""
    for field in dataclasses.fields(options):
        value, known = getattr(options, field.name), field.metadata.get("choices")
        name = f"{field.name}{of and f' of {of}'}"
        for each in value if isinstance(value, tuple) else () if value is None else (value,):
            if known is not None and each not in known:
                raise InvalidInput(f"{name} contain {each!r}, expected {', '.join(known)}")
            if isinstance(each, float) and not math.isfinite(each):
                raise InvalidInput(f"{name} is {value}, expected a finite number")
            for limit in LIMITS.keys() & field.metadata.keys():
                holds, words = LIMITS[limit]
                if not holds(each, field.metadata[limit]):
                    verb = "are" if isinstance(value, tuple) else "is"
                    raise InvalidInput(f"{name} {verb} {value}, expected {words} {field.metadata[limit]}")


def integer(name: str, value: Any, least: int | None = None) -> int:
    """Convert an argument of any integer type, including numpy's, to int; InvalidInput if it is none, or less than `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise InvalidInput(f"{name} is {value!r}, expected an integer{'' if least is None else f' of at least {least}'}")
    return number


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; CheckpointError if there is none."""
    if not path.exists():
        raise CheckpointError(f"no {path.name} in {path.parent}")
    found = read_json(path, CheckpointError)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected a JSON object")
    return found


def from_mapping(cls: type[T], mapping: Mapping[str, Any], source: str) -> T:
    """Build the dataclass `cls` from a mapping, strictly; a list may stand for a tuple.

    Raises:
        ConfigError: a key is unknown (the nearest known key is named) or missing, or a value has the wrong type.

    >>> from_mapping(MedusaConfig, {"hiden_size": 8}, "heads.yaml")
    Traceback (most recent call last):
    medusa.errors.ConfigError: heads.yaml: unknown key 'hiden_size'; did you mean 'hidden_size'?
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints, values = typing.get_type_hints(cls), dict(mapping)
    for key, value in mapping.items():
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{source}: unknown key {key!r}; {hint}")
        if typing.get_origin(hints[key]) is tuple and isinstance(value, list):
            values[key] = value = tuple(value)
        if not _fits(value, hints[key]):
            wanted = str(fields[key].type)
            raise ConfigError(f"{source}: {key} is {value!r} ({type(value).__name__}), expected {wanted}")
    absent = [
        name
        for name, field in fields.items()
        if name not in mapping and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if absent:
        raise ConfigError(f"{source}: {', '.join(absent)} must be given")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    kind = origin or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str | Path if kind is Path else kind)
