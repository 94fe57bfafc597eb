"""What the verbs share: their common options, loading a model by name, and talking to stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.errors import InvalidInput, one_line
from medusa.files import is_unicode, read_text

if TYPE_CHECKING:
    from medusa.model import MedusaModel
    from medusa.trees import Tree

ModelArgument = Annotated[
    str, typer.Argument(help="The backbone: a folder, GGUF file or hub id, or `smollm2` or `embedded`.", show_default=True)
]
GgufOption = Annotated[str | None, typer.Option("--gguf-file", help="The GGUF file to take of a folder or hub id.")]
RevisionOption = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of the model's hub id; of others: ID@REVISION."),
]
HeadsOption = Annotated[
    str | None, typer.Option("--heads", help="Folder or hub id of the heads (default: the model's own folder).")
]
TreeOption = Annotated[
    str | None,
    typer.Option("--tree", help="A tree file, a preset, or `root` for plain decoding (default: the one beside the heads)."),
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32 (default: the backbone's own).")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, … (default: cuda where there is one).")]
QuantizationOption = Annotated[
    str, typer.Option("--quantization", help="none, nf4 or int8: how the backbone's weights are held (bitsandbytes).")
]
OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Take hub ids from the local cache and ask no network.",
        callback=lambda offline: _go_offline(offline),
        is_eager=True,
    ),
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the step with torch.compile (a slow first step).")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="The most tokens to generate.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 is greedy; more samples from the model's own distribution.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Sample within this share of the probability.")]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Sample tokens of at least this share of the likeliest one's probability."),
]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 discourages tokens already there.")]
Acceptance = Annotated[str, typer.Option("--acceptance", help="exact (lossless) or typical (paper 2.3.1).")]
Epsilon = Annotated[float, typer.Option("--epsilon", help="Hard threshold of typical acceptance.")]
Delta = Annotated[float, typer.Option("--delta", help="Entropy-dependent threshold of typical acceptance.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]


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
    if temperature < 0:
        raise InvalidInput(f"temperature is {temperature}, wanted 0 (greedy) or more")
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
    """The model's name with the revision and the GGUF file that are to be taken of it."""
    model = at(model, revision)
    return model if gguf_file is None else f"{model}/{gguf_file}"


def at(name: str, revision: str | None) -> str:
    """A hub id at a revision; what is here already has none, and an id that names its own keeps it."""
    here = name in ("embedded", "smollm2") or Path(name).exists()
    return name if revision is None or here or "@" in name else f"{name}@{revision}"


def _go_offline(offline: bool) -> None:
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, and handed on to worker processes
        if "huggingface_hub" in sys.modules:
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = True


def dtype_named(name: str | None):
    """A torch dtype by name; None stays None."""
    import torch

    if name is None:
        return None
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise InvalidInput(f"dtype is {name!r}, wanted one of {', '.join(known)}")
    return known[name]


def default_device(name: str | None) -> str:
    import torch

    if name is None:
        # Of several processes on a machine each takes a GPU of its own.
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"device {name!r} is not there: {str(error).splitlines()[0]}") from None
    return name


def load_tree(name: str | None) -> Tree | None:
    from medusa.tree import MedusaTree
    from medusa.trees import load_tree as load

    if name is None:
        return None
    return MedusaTree([]) if name == "root" else load(name)


def load_model(
    model: str,
    heads: str | None = None,
    tree: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    quantization: str = "none",
    heads_wanted: bool = True,
) -> MedusaModel:
    """The Medusa model that the options name, on its device; one without heads decodes plainly where none are wanted."""
    from medusa.checkpoints import has_heads
    from medusa.hub import find_model
    from medusa.loading import load_backbone
    from medusa.model import MedusaModel
    from medusa.quantization import quantized

    quiet_transformers()
    source = find_model(model, code=trust_remote_code)
    options: dict[str, Any] = {
        "dtype": dtype_named(dtype),
        "device_map": default_device(device),
        "trust_remote_code": trust_remote_code,
        **quantized(quantization, dtype_named(dtype)),
    }
    plain = tree == "root" or not heads_wanted
    if plain and heads is None and not has_heads(source.heads or source.folder):
        return MedusaModel(load_backbone(source, **options))
    return MedusaModel.from_pretrained(model, heads=heads, tree=load_tree(tree), **options)


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    from medusa.hub import find_model
    from medusa.loading import load_tokenizer as load

    return load(find_model(model, code=trust_remote_code), trust_remote_code=trust_remote_code)


def quiet_transformers() -> None:
    """transformers' own progress bars and advice would drown ours."""
    from logging import CRITICAL, getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel(CRITICAL)  # says at import which kernels it has not


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt given, a file's text, or stdin where neither is named."""
    if prompt is not None and file is not None:
        raise InvalidInput("give a prompt or --prompt-file, not both")
    if file is not None:
        return read_text(file, InvalidInput)
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        raise InvalidInput("no prompt; give one as an argument, with --prompt-file, or on stdin")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the prompt on stdin is not UTF-8: {error}") from None


def encode(tokenizer: Any, text: str, messages: list[dict[str, str]] | None = None):
    """Token ids (1, P) of a text, or of a conversation under the tokenizer's chat template."""
    import torch

    if not all(map(is_unicode, [text, *(message["content"] for message in messages or ())])):
        raise InvalidInput("the prompt is no valid Unicode: bytes that are not UTF-8, or half of a surrogate pair")
    if messages is not None:
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # jinja2's, which templates raise on roles they do not take
            raise InvalidInput(f"the model's chat template refuses the conversation: {one_line(error)}") from None
    else:
        ids = tokenizer(text, verbose=False)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]  # an empty prompt starts a text
    return torch.tensor([ids], dtype=torch.long)


def integers(name: str, text: str, least: int = 1) -> list[int]:
    """Integers with commas between."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInput(f"--{name} is {text!r}, wanted integers such as 1,16,64") from None
    if min(values) < least:
        raise InvalidInput(f"--{name} holds {min(values)}, wanted at least {least}")
    return values


def note(message: str) -> None:
    """A line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)
