"""What the verbs share: their common options, loading a model by name, and talking to stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.errors import InvalidInput, one_line
from medusa.runs.files import is_unicode, read_text

if TYPE_CHECKING:
    from medusa.model import MedusaModel
    from medusa.trees.files import Tree

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
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Ask the prompt under the model's chat template, or continue it as it stands (default: ask where there is one).",
        show_default=False,
    ),
]
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
    from medusa.trees.files import load_tree as load
    from medusa.trees.static import MedusaTree

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
    from medusa.checkpoints.hub import find_model
    from medusa.checkpoints.loading import load_backbone
    from medusa.checkpoints.quantization import quantized
    from medusa.model import MedusaModel

    quiet_transformers()
    source = find_model(model, code=trust_remote_code)
    given = load_tree(tree)
    options: dict[str, Any] = {
        "dtype": dtype_named(dtype),
        "device_map": default_device(device),
        "trust_remote_code": trust_remote_code,
        **quantized(quantization, dtype_named(dtype)),
    }
    plain = require_heads(model, heads, tree == "root" or not heads_wanted)
    with waiting(f"loading {model}"):
        if plain:
            return MedusaModel(load_backbone(source, **options))
        return MedusaModel.from_pretrained(source, heads=heads, tree=given, **options)


def require_heads(model: str, heads: str | None, plainly: bool = False) -> bool:
    """Whether decoding does without heads; before anything is loaded.

    Args:
        plainly: decoding may do without them.

    Raises:
        InvalidInput: there are none where they are named or needed.
    """
    from medusa.checkpoints.hub import find_heads
    from medusa.checkpoints.reader import has_heads

    if has_heads(find_heads(heads if heads is not None else model)):
        return False
    if plainly and heads is None:
        return True
    raise InvalidInput(
        f"{heads or model} has no Medusa heads; give some with --heads FOLDER, train some (medusa train {model}), or decode "
        "plainly with --tree root"
    )


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    from medusa.checkpoints.hub import find_model
    from medusa.checkpoints.loading import load_tokenizer as load

    quiet_transformers()
    source = find_model(model, code=trust_remote_code)
    with waiting(f"loading the tokenizer of {model}"):
        return load(source, trust_remote_code=trust_remote_code)


def check_room(model: str, prompt_tokens: int, max_new_tokens: int, trust_remote_code: bool = False) -> None:
    """Refuse a prompt that is too long before the model is loaded; a GGUF file's is told after, since its config takes long.

    Raises:
        ContextOverflow: prompt and new tokens do not fit.
    """
    from medusa.backbone.lm import max_length_of
    from medusa.checkpoints.hub import find_model
    from medusa.checkpoints.loading import load_config
    from medusa.decoding import check_length

    source = find_model(model, code=trust_remote_code)
    if source.gguf_file is None:
        max_length = max_length_of(load_config(source, trust_remote_code=trust_remote_code))
        check_length(prompt_tokens, max_new_tokens, max_length, "--max-new-tokens")


def note_tree(medusa: MedusaModel, model: str, heads: str | None, tree: str | None) -> None:
    """Say which tree decodes, where nobody asked for it and it may be slower than plain decoding, or is plain decoding."""
    from medusa.checkpoints.hub import find_heads
    from medusa.config import TREE_FILE

    if medusa.heads is None or tree is not None:
        return
    folder, nodes = find_heads(heads if heads is not None else model), len(medusa.tree)
    tuned = _tuned(folder / "tuning.json")
    dtype = str(medusa.backbone.dtype).removeprefix("torch.")
    command = "`medusa tune` finds the fastest on this machine"
    if nodes == 1:
        why = ", as medusa tune chose: no tree paid" if tuned else ""
        note(f"the tree of these heads is the root alone{why}. This is plain decoding; heads trained for longer may pay")
    elif not (folder / TREE_FILE).is_file():
        note(f"these heads have no tree file: a dynamic tree of {nodes} nodes, maybe slower than --tree root; {command}")
    elif tuned and tuned.get("dtype") not in (None, dtype):
        note(f"the tree of these heads was tuned in {tuned['dtype']} and runs in {dtype} now, maybe slower than --tree root")
    elif not tuned and heads is not None:
        note(f"the tree of these heads, {nodes} nodes, is not tuned, maybe slower than --tree root; {command}")


def _tuned(file: Path) -> dict[str, Any]:
    """What `medusa tune` says it was run with; nothing where it was not."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["made_with"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


WORTH = 1.2  # tokens a step; trees that accept less are seldom faster than plain decoding
STEPS_TO_TELL = 8


def speed(tokens: int, steps: int, seconds: float) -> str:
    """How fast an answer came, in words."""
    return f"{tokens / seconds:.1f} tokens/s, {tokens / steps:.2f} tokens a step"


def note_low_rate(medusa: MedusaModel, tokens: int, steps: int) -> None:
    """Say so where a tree was hardly right: its steps cost more than plain ones."""
    nodes = len(medusa.tree)
    if nodes > 1 and steps >= STEPS_TO_TELL and tokens / steps < WORTH:
        note(f"a tree of {nodes} nodes that is right so seldom is likely slower than --tree root; train the heads for longer")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """On a terminal, a line on stderr that says what takes its time, gone at the end."""
    from rich.console import Console

    out = Console(stderr=True)
    with out.status(what) if out.is_terminal else nullcontext():
        yield


def refuse_prompt_as_model(model: str, remedy: str) -> None:
    """Refuse a text where the model is named.

    Args:
        remedy: how a prompt is given.
    """
    if any(character.isspace() for character in model.strip()) and not Path(model).exists():
        raise InvalidInput(f"{model[:60]!r} is given as the model, and looks like a prompt; {remedy}")


def quiet_transformers() -> None:
    """transformers' own progress bars and advice would drown ours."""
    from logging import CRITICAL, getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel(CRITICAL)  # says at import which kernels it has not
    with suppress(ImportError, AttributeError):  # the bar over a GGUF file's tensors has no switch
        from transformers import modeling_gguf_pytorch_utils as gguf

        gguf.tqdm = lambda tensors, **_: tensors


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt given, a file's text, or stdin where neither is named."""
    if prompt is not None and file is not None:
        raise InvalidInput("give a prompt or --prompt-file, not both")
    if prompt is not None:
        return prompt
    if file is not None:
        text = read_text(file, InvalidInput)
    elif sys.stdin.isatty():
        raise InvalidInput("no prompt; give one as an argument, with --prompt-file, or on stdin")
    else:
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the prompt on stdin is not UTF-8: {error}") from None
    if not text.strip():
        raise InvalidInput(f"{file or 'stdin'} holds no prompt; give one as an argument, with --prompt-file, or on stdin")
    return text


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


def as_asked(tokenizer: Any, text: str, chat: bool | None, model: str) -> list[dict[str, str]] | None:
    """A prompt as a conversation; None where it is a text to be continued.

    Args:
        chat: whether it is one; None: it is where the tokenizer has a chat template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise InvalidInput(f"{model} has no chat template: it continues text; drop --chat or take a chat model")
    return [{"role": "user", "content": text.strip("\n")}] if has_template and chat is not False else None


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
    """A line on stderr; on a terminal it is broken between words."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        message = textwrap.fill(message, width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
    print(message, file=sys.stderr, flush=True)
