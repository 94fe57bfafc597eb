"""Samples and prompts: conversations and texts, read from the usual formats of data sets."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa.errors import InvalidInput, one_line
from medusa.runs.extras import require
from medusa.runs.files import is_unicode, read_json, read_text

SUFFIXES = (".jsonl", ".json", ".parquet")
FORMATS = ("messages", "conversations", "prompt", "text", "input_ids")  # a record's format is the first key it has
# ShareGPT's names of the speakers, and OpenAI's.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Sample:
    """One record: exactly one of `messages`, `text` and `input_ids` is given."""

    source: str  # its place, for errors: `file:line` or `file, record n`
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    prompt: str | None = None  # text before `text` that is not labelled (prompt/completion records)
    input_ids: tuple[int, ...] | None = None
    prompt_tokens: int = 0  # number of the first `input_ids` that are not labelled
    cut: bool = False  # whether the last turn was cut off: its end is not labelled


class Skips:
    """Samples that were left out, by reason."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, source: str) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, source)

    def __len__(self) -> int:
        return self.reasons.total()

    def __str__(self) -> str:
        return "; ".join(f"{n} {reason} (first: {self.first[reason]})" for reason, n in self.reasons.most_common())


def read_samples(source: str | Path, skips: Skips | None = None) -> Iterator[Sample]:
    """The samples of a JSON, JSONL or Parquet file, of a folder of such files, or of a `datasets` folder or hub id.

    A record is `{"messages": [{"role", "content"}]}`, ShareGPT's `{"conversations": [{"from", "value"}]}`,
    `{"prompt", "completion"}` (two strings, or two lists of messages), `{"text"}` or `{"input_ids"}`. A hub id may name
    its split after a colon: `user/name:train_sft` (default: train).

    Args:
        skips: counts conversations that are empty or whose turns do not alternate; None: they are errors.

    Raises:
        InvalidInput: no such data, a broken file, or a record of an unknown or different format; file and line are named.
    """
    first_format: str | None = None
    empty = True
    for where, record in read_records(source):
        empty = False
        if not isinstance(record, dict):
            raise InvalidInput(f"{where} is a {type(record).__name__}, expected an object")
        found = next((key for key in FORMATS if record.get(key) is not None), None)
        if found is None:
            raise InvalidInput(f"{where} has keys {sorted(record)}, expected one of {', '.join(FORMATS)}")
        first_format = first_format or found
        if found != first_format:
            raise InvalidInput(f"{where} has {found!r}, but the records before it have {first_format!r}; split the file")
        try:
            yield _sample(where, record, found)
        except _Unusable as error:
            _skip(skips, str(error), where, f"{where}: {error}")
    if empty:
        raise InvalidInput(f"{source} holds no records")


@dataclass(frozen=True)
class Asked:
    """One record as a prompt: `turns` or `ids`."""

    source: str  # its place, for errors
    record: dict[str, Any]  # the complete record
    turns: tuple[str, ...] = ()  # the user's turns, each to be answered before the next; a bare prompt is one turn
    system: str = ""  # system message before the first turn
    ids: tuple[int, ...] = ()
    text: str = ""  # the prompt as a text to continue; empty if it can only be answered
    whole: bool = True  # whether nothing of the text may be cut off: it is a prompt, not the beginning of a document


ASKED = "turns, instruction, messages, conversations, prompt, text or input_ids"


def read_prompts(source: str | Path, skips: Skips | None = None) -> Iterator[Asked]:
    """Prompts, for every command that takes some: a `.txt` file with one prompt per line, or records as in `read_samples`.

    A record is `{"messages"}` or `{"conversations"}` (the assistant's turns are dropped), `{"turns": [text, …]}` (MT-Bench),
    `{"instruction"}` and optionally `{"input"}` (AlpacaEval), `{"prompt"}` (a text, texts, or messages), `{"text"}`, or
    `{"input_ids"}` and optionally `{"prompt_tokens"}`.

    Args:
        skips: counts empty prompts and broken conversations; None: they are errors.

    Raises:
        InvalidInput: no such data, a broken file, or a record that is not a prompt; file and line are named.
    """
    for where, record in read_records(source):
        try:
            asked = _asked(where, record)
        except _Unusable as error:
            _skip(skips, str(error), where, f"{where} is a record {error}")
            continue
        if asked.ids or (asked.turns and all(text.strip() for text in asked.turns)):
            yield asked
        else:
            _skip(skips, "with nothing to answer", where, f"{where} has an empty prompt")


def _skip(skips: Skips | None, reason: str, where: str, error: str) -> None:
    """Count a record that is left out; without a count it is an error."""
    if skips is None:
        raise InvalidInput(error)
    skips.add(reason, where)


def _asked(where: str, record: Any) -> Asked:
    if not isinstance(record, dict):
        raise InvalidInput(f"{where} is a {type(record).__name__}, expected an object with {ASKED}")
    if isinstance(talk := record.get("messages", record.get("conversations")), list):
        return _asked_in(where, record, talk)
    if isinstance(ids := record.get("input_ids"), list):
        return Asked(where, record, ids=_token_ids(where, ids[: record.get("prompt_tokens") or None] or None))
    key = next((key for key in ("turns", "instruction", "prompt", "text") if record.get(key) is not None), None)
    if key is None:
        raise InvalidInput(f"{where} has keys {sorted(record)}, expected {ASKED}")
    value = record[key]
    if isinstance(value, list) and value and isinstance(value[0], dict):  # a prompt of messages
        return _asked_in(where, record, value)
    turns = [value] if isinstance(value, str) else value
    if not isinstance(turns, list | tuple) or not all(isinstance(text, str) for text in turns):
        raise InvalidInput(f"{where}: its turns are {str(turns)[:60]!r}, expected a list of strings")
    turns = tuple(_string(where, key, text) for text in turns)
    if key == "instruction" and record.get("input"):
        turns = (f"{value}\n\n{record['input']}",)
    return Asked(where, record, turns, text=turns[0] if len(turns) == 1 else "", whole=key != "text")


def _asked_in(where: str, record: dict[str, Any], talk: list[Any]) -> Asked:
    messages = _messages(where, talk)
    system = "\n".join(message["content"] for message in messages if message["role"] == "system")
    return Asked(where, record, tuple(message["content"] for message in messages if message["role"] == "user"), system)


class _Unusable(Exception):
    """A sample that cannot be used for training; the message is the reason."""


def _sample(where: str, record: dict[str, Any], found: str) -> Sample:
    value = record[found]
    if found == "input_ids":
        prompt_tokens = record.get("prompt_tokens", 0)
        if type(prompt_tokens) is not int or prompt_tokens < 0:
            raise InvalidInput(f"{where}: 'prompt_tokens' is {prompt_tokens!r}, expected a count")
        return Sample(where, input_ids=_token_ids(where, value), prompt_tokens=prompt_tokens)
    if found == "text":
        return Sample(where, text=_string(where, "text", value))
    if found == "prompt":
        completion = record.get("completion")
        if isinstance(value, list) and isinstance(completion, list):
            return Sample(where, messages=_messages(where, value + completion))
        if completion is None:
            raise InvalidInput(f"{where} has a 'prompt' and no 'completion'; have the model answer it first: medusa distill")
        return Sample(where, text=_string(where, "completion", completion), prompt=_string(where, "prompt", value))
    if not isinstance(value, list):
        raise InvalidInput(f"{where}: {found!r} is a {type(value).__name__}, expected a list of turns")
    return Sample(where, messages=_messages(where, value), cut=record.get("cut") is True)


def _token_ids(where: str, value: Any) -> tuple[int, ...]:
    if not (isinstance(value, list) and all(type(token) is int for token in value)):
        raise InvalidInput(f"{where}: 'input_ids' is not a list of integers")
    return tuple(value)


def _string(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"{where}: {key!r} is a {type(value).__name__}, expected a string")
    if not is_unicode(value):
        raise _Unusable("with text that is not valid Unicode")
    return value


def _messages(where: str, turns: list[Any]) -> tuple[Message, ...]:
    """The turns as role and content: an optional system turn, then user and assistant in alternation, the user first."""
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise InvalidInput(f"{where}: a turn is a {type(turn).__name__}, expected an object")
        name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(name, str) or name not in ROLES:
            raise InvalidInput(f"{where}: a turn's role is {name!r}, expected system, user or assistant")
        messages.append({"role": ROLES[name], "content": _string(where, "content", content)})
    if not messages:
        raise _Unusable("with an empty conversation")
    start = 1 if messages[0]["role"] == "system" else 0
    # ShareGPT cuts long conversations into pieces; the later ones begin with the assistant's turn.
    if start == 0 and messages[0]["role"] == "assistant":
        messages = messages[1:]
    expected = ("user", "assistant")
    if any(message["role"] != expected[i % 2] for i, message in enumerate(messages[start:])):
        raise _Unusable("whose turns do not alternate")
    return tuple(messages)


def read_records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """The raw records of a file, folder or hub id, each with its place for errors; each line of a `.txt` file is a prompt."""
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            yield from _records_of_dataset(str(source))
            return
        files = sorted(file for suffix in SUFFIXES for file in path.glob(f"*{suffix}"))
        if not files:
            raise InvalidInput(f"{path} holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from _records_of_file(file)
    elif path.is_file():
        yield from _records_of_file(path)
    elif path.suffix in (*SUFFIXES, ".txt") or path.is_absolute() or str(source).startswith("."):
        raise InvalidInput(f"no data file {path}")
    else:
        yield from _records_of_dataset(str(source))


def _records_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".txt":
        yield from _records_of_text(path)
    elif path.suffix == ".parquet":
        yield from _records_of_parquet(path)
    elif path.suffix == ".json" and _first_character(path) == "[":
        records = read_json(path, InvalidInput)
        yield from ((f"{path}, record {n}", record) for n, record in enumerate(records, 1))
    else:
        yield from _records_of_lines(path)


def _records_of_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # which some editors add
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise InvalidInput(f"{path}:{number} is not valid JSON: {one_line(error)}") from None
                yield f"{path}:{number}", record
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from None


def _records_of_text(path: Path) -> Iterator[tuple[str, Any]]:
    """One prompt per line; empty lines are skipped."""
    lines = read_text(path, InvalidInput).splitlines()
    yield from ((f"{path}:{number}", {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip())


def _first_character(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1].decode("latin-1")
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from None


def _records_of_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    parquet = require("pyarrow.parquet", "data", f"the Parquet file {path}")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", record
    except Exception as error:  # pyarrow's, or a text that is not UTF-8
        raise InvalidInput(f"{path} is broken or not a Parquet file: {one_line(error, 120)}") from None


def _records_of_dataset(name: str) -> Iterator[tuple[str, Any]]:
    datasets = require("datasets", "data", f"the data set {name}")
    identifier, _, split = name.partition(":")
    try:
        if Path(identifier).is_dir():
            data = datasets.load_from_disk(identifier)
            if isinstance(data, dict):
                data = data[split or "train"]
        else:
            data = datasets.load_dataset(identifier, split=split or "train", streaming=True)
        for number, record in enumerate(data, 1):
            yield f"{name}, record {number}", record
    except Exception as error:  # from datasets, the hub, or readers of any file format
        raise InvalidInput(f"{name} is not a file here and cannot be read as a data set: {one_line(error, 160)}") from None
