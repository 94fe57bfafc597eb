"""Prompts from the command line: an argument, a file or stdin."""

from __future__ import annotations

import sys
from pathlib import Path

from medusa.errors import InvalidInput
from medusa.runs.files import read_text


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The given prompt, the text of a file, or stdin; InvalidInput if there is none, there are two, or it is not UTF-8."""
    if prompt is not None and file is not None:
        raise InvalidInput("give a prompt or --prompt-file, not both")
    if prompt is not None:
        return prompt
    if file is not None:
        if file.suffix in (".jsonl", ".parquet"):
            raise InvalidInput(f"{file} is a set of prompts, --prompt-file the text of one; `medusa distill` answers sets")
        text = read_text(file, InvalidInput)
    elif sys.stdin.isatty():
        raise InvalidInput("no prompt; give one as an argument, with --prompt-file, or on stdin")
    else:
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the prompt on stdin is not UTF-8: {error}") from None
    if not text.strip():
        raise InvalidInput(f"{file or 'stdin'} is empty; give a prompt as an argument, with --prompt-file, or on stdin")
    return text


def refuse_prompt_as_model(model: str, remedy: str) -> None:
    """Refuse a text in place of the model; the remedy says how to give a prompt."""
    if any(character.isspace() for character in model.strip()) and not Path(model).exists():
        raise InvalidInput(f"{model[:60]!r} is in the place of the model, but looks like a prompt; {remedy}")
