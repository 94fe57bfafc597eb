"""Options that several commands share, and flags made from dataclasses of options."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from medusa.config import Quantization, check_options, from_mapping, option
from medusa.errors import InvalidInput

T = TypeVar("T")

ModelArgument = Annotated[
    str, typer.Argument(help="The backbone: a folder, GGUF file or hub id, or `smollm2` or `embedded`.", show_default=True)
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit on the hub; for hub ids in other options, write ID@REVISION.")
]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Use only the local cache of the hub, and no network.",
        callback=lambda offline: _go_offline(offline),
        is_eager=True,
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps, … (default: a GPU if there is one).")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
TreeOption = Annotated[
    str | None, typer.Option(help="A tree file, a preset, or `root` for plain decoding (default: the tree beside the heads).")
]
QuantizationOption = Annotated[
    Quantization,
    typer.Option(help="Quantize the backbone: nf4, int8 (bitsandbytes), or int8-dynamic, int4-dynamic (fastest on a CPU)."),
]
TpOption = Annotated[
    int, typer.Option(min=1, help="Number of GPUs that share every layer (tensor parallel), or of processes on a CPU.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="One graph per step: compiled on a CPU (slow first step), recorded on a GPU.")
]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        help="Format the prompt with the model's chat template, or continue it as plain text (default: the template, if any).",
        show_default=False,
    ),
]
PromptFileOption = Annotated[Path | None, typer.Option("--prompt-file", "-f", help="Read the prompt from a file.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Maximum number of tokens to generate.")]
EndpointKeyOption = Annotated[
    str, typer.Option("--api-key-env", help="Environment variable that holds the endpoint's API key.")
]


@dataclass(frozen=True)
class Locating:
    """Options of the commands that read a model's files."""

    gguf_file: str | None = option(None, "Name of the GGUF file in the folder or repository.")
    revision: RevisionOption = None
    offline: OfflineOption = False
    trust_remote_code: TrustOption = False


@dataclass(frozen=True)
class Loading(Locating):
    """Options of the commands that load a model with heads."""

    heads: str | None = option(None, "Folder or hub id of the heads (default: the model's own folder).")
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option("--dtype", metavar="DTYPE", help="bfloat16, float16 or float32 (default: the backbone's own)."),
    ] = None
    device: DeviceOption = None


@dataclass(frozen=True)
class Sampling:
    """Options of the commands that generate text for a user."""

    temperature: float = option(
        0.0,
        "Temperature: 0 is greedy; above 0 samples from the model's own distribution.",
        flags=("--temperature", "-t"),
        least=0,
    )
    top_k: int | None = option(None, "Sample from the k most likely tokens.")
    top_p: float | None = option(None, "Sample from the smallest set of most likely tokens with this total probability.")
    min_p: float | None = option(None, "Sample from tokens at least this fraction as probable as the most likely one.")
    repetition_penalty: float | None = option(None, "Penalty that, above 1, discourages tokens already in the text.")
    presence_penalty: float = option(0.0, "Amount subtracted from the score of every token already generated.")
    frequency_penalty: float = option(0.0, "Amount subtracted from a token's score for each time it has been generated.")
    acceptance: Literal["exact", "typical"] = option(
        "exact", "Acceptance rule: exact is lossless; typical is not (paper 2.3.1)."
    )
    epsilon: float = option(0.09, "Hard threshold of typical acceptance.")
    delta: float = option(0.3, "Entropy-dependent threshold of typical acceptance.")
    seed: int | None = option(None, "Seed that makes sampling reproducible.")


def with_options(*groups: type, unset: bool = False, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each field of dataclasses of options, except for those that it declares itself. They arrive as
    keyword arguments; lists that are not given are left out.

    Args:
        groups: the dataclasses; a field has a typer.Option in its type, or is made by `medusa.config.option`.
        unset: leave out all that is not given, and show none in --help.
        defaults: the command's own defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        may_lack = set()
        for group in groups:
            hints = typing.get_type_hints(group, include_extras=True)
            for field in fields(group):
                if field.name not in own.parameters:
                    default = defaults.get(field.name, field.default)
                    parameters.append(_parameter(field, hints[field.name], default, unset))
                    if unset or isinstance(default, tuple):
                        may_lack.add(field.name)

        @functools.wraps(command)
        def wrapped(**arguments: Any) -> None:
            given = {name: value for name, value in arguments.items() if name not in may_lack or value not in (None, [])}
            plain = {
                name: [getattr(each, "value", each) for each in found] for name, found in given.items() if type(found) is list
            }
            command(**given | plain)

        wrapped.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del wrapped.__wrapped__  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _parameter(field: Field, kind: Any, default: Any, unset: bool) -> inspect.Parameter:
    """The parameter of a command for a field of this type; that of a tuple is a list, None if it is not given."""
    if typing.get_origin(kind) is not Annotated:
        about = dict(field.metadata)
        text, flags, choices = about["help"], about.get("flags", ()), about.get("choices")
        flag = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            flags = flags or ((f"{flag}/--no-{flag[2:]}" if unset or default else flag),)
        if isinstance(default, tuple):
            (inner, _), default = typing.get_args(kind), None
            kind = list[StrEnum("Choice", {each: each for each in choices}) if choices else inner] | None  # type: ignore[misc]
        limits: dict[str, Any] = {} if unset else {"min": about.get("least"), "max": about.get("most")}
        kind = Annotated[kind | None if unset else kind, typer.Option(*flags, help=text, hidden=unset, **limits)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None if unset else default, annotation=kind)


def take(kind: type[T], options: dict[str, Any]) -> T:
    """Take a dataclass of options out of a command's options."""
    names = {field.name for field in fields(kind)} & options.keys()  # type: ignore[arg-type]
    taken = from_mapping(kind, {name: options.pop(name) for name in names}, "options")
    check_options(taken)
    return taken


def sampling_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of `Sampling` out of a command's; returns the keyword arguments of `MedusaModel.generate` for them."""
    found = {field.name: options.pop(field.name) for field in fields(Sampling)}
    check_options(Sampling(**found))
    temperature = found["temperature"]
    if found["acceptance"] == "typical" and not temperature:
        raise InvalidInput("typical acceptance needs a temperature: at 0 it is greedy decoding; pass --temperature 0.7, say")
    if not temperature:
        del found["temperature"]
        for name in ("top_k", "top_p", "min_p"):
            if found.pop(name) is not None:
                flag = name.replace("_", "-")
                raise InvalidInput(f"--{flag} does nothing at temperature 0, which is greedy; pass --temperature 1, say")
    return {"do_sample": bool(temperature), **found}


def full_name(model: str, options: dict[str, Any]) -> str:
    """The model's full name, with its revision and its GGUF file, which are taken out of a command's options."""
    from medusa.checkpoints.hub import with_file

    options.pop("offline")  # has been followed
    return with_file(model, options.pop("gguf_file"), options.pop("revision"))


def _go_offline(offline: bool) -> bool:
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; worker processes inherit it
        if "huggingface_hub" in sys.modules:
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = True
    return offline
