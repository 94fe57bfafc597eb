"""Write docs/cli.md from the commands' own help: `python docs/cli.py` (tests/test_docs.py checks that it is up to date)."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from medusa.cli import VERBS, app

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """\
# Command line

Every command and its options, generated from `--help` by `make docs`. An option of the type `list[…]` may be repeated.
A usage error exits with status 2, any other error with status 1 and one line on stderr.
"""
TRAINING = "The training options. `--method` sets their values, which `medusa train --method NAME --help` shows."


def page() -> str:
    group: Any = get_command(app)
    parent = typer.Context(group, info_name="medusa")
    sections = [INTRODUCTION]
    for verb in VERBS:
        command = group.commands[verb]
        context = typer.Context(command, info_name=verb, parent=parent)
        sections.append(f"## medusa {verb}\n\n    medusa {verb} {' '.join(command.collect_usage_pieces(context))}\n")
        sections += [wrapped(paragraph) for paragraph in inspect.cleandoc(command.help or "").split("\n\n")]
        parameters = command.get_params(context)
        shown = [parameter for parameter in parameters if not getattr(parameter, "hidden", False)]
        sections.append("".join(item(*parameter.get_help_record(context)) for parameter in shown))
        if hidden := [parameter for parameter in parameters if parameter not in shown]:  # `train` shows these itself
            sections += [wrapped(TRAINING), "".join(item(", ".join(parameter.opts), parameter.help) for parameter in hidden)]
    return "\n".join(sections)


def item(names: str, text: str) -> str:
    return wrapped(f"- `{names.strip()}`: {text}", "  ")


def wrapped(text: str, indent: str = "") -> str:
    plain = " ".join(text.split())
    return textwrap.fill(plain, 132, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
