"""The command line: one file per command; our errors are one line and exit with 1, usage errors with 2."""

from __future__ import annotations

import sys
from importlib import import_module
from logging import CRITICAL, getLogger

import typer

VERBS = (
    "demo",
    "generate",
    "chat",
    "serve",
    "distill",
    "train",
    "tune",
    "tree",
    "bench",
    "experiment",
    "judge",
    "simulate",
    "convert",
    "inspect",
)

app = typer.Typer(
    name="medusa",
    help="Any Hugging Face causal language model, faster, with no draft model and no change to its output.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in VERBS:  # the commands import torch only when they run
    _module = import_module(f"medusa.cli.{_verb}")
    app.command(_verb, cls=getattr(_module, "COMMAND", None))(getattr(_module, f"{_verb}_command"))


def main() -> None:
    from medusa.errors import MedusaError, one_line
    from medusa.runs.console import note

    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    getLogger("bitsandbytes").setLevel(CRITICAL)  # logs missing kernels at import
    try:
        app()
    except MedusaError as error:
        note(f"medusa: {error}")
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:  # our own errors cover reading; this one is from writing
        print(f"medusa: cannot write {error.filename or 'a file'}: {error.strerror or one_line(error)}", file=sys.stderr)
        sys.exit(1)
