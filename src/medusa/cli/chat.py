"""medusa chat: a conversation in the terminal."""

from __future__ import annotations

import sys
import time

import typer

from medusa.cli import common, prompting, showing
from medusa.errors import ContextOverflow, InvalidInput
from medusa.runs.console import note

COMMANDS = "/reset forgets the conversation, /help shows this, /quit or end of file ends it; Ctrl-C stops an answer"


def chat_command(
    model: common.ModelArgument = "embedded",
    heads: common.HeadsOption = None,
    tree: common.TreeOption = None,
    system: str | None = typer.Option(None, "--system", help="System message at the beginning."),
    max_new_tokens: common.MaxNewTokens = 512,
    temperature: common.Temperature = 0.7,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    min_p: common.MinP = None,
    repetition_penalty: common.Penalty = None,
    acceptance: common.Acceptance = "exact",
    epsilon: common.Epsilon = 0.09,
    delta: common.Delta = 0.3,
    seed: common.Seed = None,
    quantization: common.QuantizationOption = "none",
    gguf_file: common.GgufOption = None,
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    trust_remote_code: common.TrustOption = False,
) -> None:
    """Talk to a model that has a chat template. Type /help for its commands."""
    import torch

    from medusa.checkpoints import named
    from medusa.data.prompts import prompt_ids
    from medusa.generation import Collected
    from medusa.text import Detokenizer

    prompting.refuse_prompt_as_model(model, "start with medusa chat MODEL and say it there")
    model = common.with_file(model, gguf_file, revision)
    options = common.sampling_options(temperature, top_k, top_p, min_p, repetition_penalty, acceptance, epsilon, delta, seed)
    named.require_heads(model, heads, tree == "root")
    tokenizer = named.load_tokenizer(model, trust_remote_code)
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(f"{model} has no chat template: it continues text; use `medusa generate` or a chat model")
    medusa = named.load_model(model, heads, tree, dtype, device, trust_remote_code, quantization)
    named.note_advice_on_tree(medusa, model, heads, tree)
    terminal = sys.stdin.isatty()
    if terminal:
        note(f"{model} is listening. {COMMANDS}")
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            said = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the text on stdin is not {error.encoding}: {error.reason}") from None
        if said == "/quit":
            return
        if said == "/reset":
            messages = list(opening)
            continue
        if said.startswith("/") and " " not in said and "/" not in said[1:]:  # /etc/hosts is not a command
            note(COMMANDS if said == "/help" else f"{said} is not a command: {COMMANDS}")
            continue
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        ids = torch.tensor([prompt_ids(tokenizer, messages)])
        detokenizer = Detokenizer(tokenizer, ids[0].tolist())
        answer, collected, words = "", Collected(), showing.Words(showing.console())
        start = time.perf_counter()
        try:
            steps = medusa.stream(ids, ids.new_ones(ids.shape), max_new_tokens=max_new_tokens, **options)
            for step in collected.follow(steps):
                piece = detokenizer.put(step.tokens[0])
                answer += piece
                words.put(piece)
        except KeyboardInterrupt:
            pass  # the answer ends here, the conversation goes on
        except ContextOverflow as error:
            note(f"medusa: {error}; /reset begins a new conversation")
            messages.pop()
            continue
        seconds = time.perf_counter() - start
        rest = detokenizer.end()
        words.put(rest)
        words.end()
        messages.append({"role": "assistant", "content": answer + rest})
        if lengths := collected.lengths[0]:
            note(f"[{showing.speed(sum(lengths), len(lengths), seconds)}]")
