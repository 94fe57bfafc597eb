"""Options that several commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medusa.errors import InvalidInput

ModelArgument = Annotated[
    str, typer.Argument(help="The backbone: a folder, GGUF file or hub id, or `smollm2` or `embedded`.", show_default=True)
]
GgufOption = Annotated[str | None, typer.Option("--gguf-file", help="Name of the GGUF file in the folder or repository.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the hub; for other ids: ID@REVISION.")
]
HeadsOption = Annotated[
    str | None, typer.Option("--heads", help="Folder or hub id of the heads (default: the model's own folder).")
]
TreeOption = Annotated[
    str | None,
    typer.Option("--tree", help="A tree file, a preset, or `root` for plain decoding (default: the tree beside the heads)."),
]
DtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option("--dtype", metavar="DTYPE", help="bfloat16, float16 or float32 (default: the backbone's own)."),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, … (default: a GPU if there is one).")]
QuantizationOption = Annotated[
    Literal["none", "nf4", "int8"], typer.Option("--quantization", help="Quantize the backbone's weights (bitsandbytes).")
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
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the step with torch.compile (slow first step).")]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Format the prompt with the model's chat template, or continue it as plain text (default: the template if any).",
        show_default=False,
    ),
]
PromptFileOption = Annotated[Path | None, typer.Option("--prompt-file", "-f", help="Read the prompt from a file.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Maximum number of tokens to generate.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", min=0, help="0 is greedy; above 0 samples from the model's own distribution.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Sample from the most likely tokens of this total probability.")]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Sample from tokens of at least this fraction of the likeliest one's probability."),
]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 discourages tokens already in the text.")]
Acceptance = Annotated[
    Literal["exact", "typical"], typer.Option("--acceptance", help="exact is lossless; typical is not (paper 2.3.1).")
]
Epsilon = Annotated[float, typer.Option("--epsilon", help="Hard threshold of typical acceptance.")]
Delta = Annotated[float, typer.Option("--delta", help="Entropy-dependent threshold of typical acceptance.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed that makes sampling reproducible.")]
EndpointKeyOption = Annotated[
    str, typer.Option("--api-key-env", help="Environment variable that holds the endpoint's API key.")
]


def sampling_options(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    acceptance: str,
    epsilon: float,
    delta: float,
    seed: int | None,
) -> dict[str, Any]:
    """The keyword arguments of `MedusaModel.generate` for the command line's options."""
    if acceptance == "typical" and not temperature:
        raise InvalidInput("typical acceptance needs a temperature: at 0 it is greedy decoding; pass --temperature 0.7, say")
    sampling = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    options: dict[str, Any] = {
        "do_sample": bool(temperature),
        "repetition_penalty": repetition_penalty,
        "acceptance": acceptance,
        "epsilon": epsilon,
        "delta": delta,
        "seed": seed,
    }
    if temperature:
        return options | {"temperature": temperature, **sampling}
    for name, value in sampling.items():
        if value is not None:
            flag = name.replace("_", "-")
            raise InvalidInput(f"--{flag} does nothing at temperature 0, which is greedy; pass --temperature 1, say")
    return options


def with_file(model: str, gguf_file: str | None, revision: str | None = None) -> str:
    """The model's full name: with its revision and its GGUF file."""
    model = at(model, revision)
    return model if gguf_file is None else f"{model}/{gguf_file}"


def at(name: str, revision: str | None) -> str:
    """A hub id with its revision; local models have none, and an id that already has one keeps it."""
    here = name in ("embedded", "smollm2") or Path(name).exists()
    return name if revision is None or here or "@" in name else f"{name}@{revision}"


def _go_offline(offline: bool) -> None:
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; worker processes inherit it
        if "huggingface_hub" in sys.modules:
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = True
