"""medusa chat: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, prompting, showing
from medusa.errors import ContextOverflow, InvalidInput
from medusa.runs.console import note

if TYPE_CHECKING:
    from medusa.model import MedusaModel

COMMANDS = "/reset forgets the conversation, /help shows this, /quit or end of file ends it; Ctrl-C stops an answer"


@common.with_options(common.Sampling, common.Loading, temperature=0.7)
def chat_command(
    model: common.ModelArgument = "smollm2",
    tree: common.TreeOption = None,
    system: Annotated[str | None, typer.Option(help="System message that begins the conversation.")] = None,
    max_new_tokens: common.MaxNewTokens = 512,
    quantization: common.QuantizationOption = "none",
    tp: common.TpOption = 1,
    **options: Any,
) -> None:
    """Talk to a model that has a chat template. Type /help for its commands."""
    from medusa.checkpoints import named, parallel

    prompting.refuse_prompt_as_model(model, "start medusa chat MODEL and type the prompt there")
    model, sampling = common.full_name(model, options), common.sampling_options(options)
    named.require_heads(model, options["heads"], tree == "root")
    tokenizer = named.load_tokenizer(model, options["trust_remote_code"])
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(f"{model} has no chat template: it continues text; use `medusa generate` or a chat model")
    medusa = parallel.load_model(model, tp, tree=tree, quantization=quantization, **options)
    named.note_advice_on_tree(medusa, model, options["heads"], tree)
    chat = Chat(medusa, tokenizer, system, max_new_tokens=max_new_tokens, **sampling)
    terminal = sys.stdin.isatty()
    if terminal:
        note(f"{model} is ready. {COMMANDS}")
    while (said := _read(terminal)) not in (None, "/quit"):
        if said == "/reset":
            chat.reset()
        elif said.startswith("/") and " " not in said and "/" not in said[1:]:  # /etc/hosts is not a command
            note(COMMANDS if said == "/help" else f"{said} is not a command: {COMMANDS}")
        elif said:
            chat.answer(said)


def _read(terminal: bool) -> str | None:
    """A line that the user types; None at the end of the file or after Ctrl-C."""
    try:
        return input("> " if terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the text on stdin is not {error.encoding}: {error.reason}") from None


class Chat:
    """A conversation with a model.

    Args:
        system: system message, if any.
        options: options of `MedusaModel.stream`.
    """

    def __init__(self, model: MedusaModel, tokenizer: Any, system: str | None, **options: Any):
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._opening = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        self._messages = list(self._opening)

    def answer(self, said: str) -> None:
        """Show the model's answer as it is generated, and its speed. Ctrl-C ends the answer, not the conversation."""
        import torch

        from medusa.data.prompts import prompt_ids
        from medusa.generation.mixin import Collected
        from medusa.generation.text import Detokenizer

        messages = [*self._messages, {"role": "user", "content": said}]
        ids = torch.tensor([prompt_ids(self._tokenizer, messages)])
        detokenizer, words = Detokenizer(self._tokenizer, ids[0].tolist()), showing.Words(showing.console())
        collected, pieces, start = Collected(), list[str](), time.perf_counter()
        try:
            for step in collected.follow(self._model.stream(ids, ids.new_ones(ids.shape), **self._options)):
                pieces.append(detokenizer.put(step.tokens[0]))
                words.put(pieces[-1])
        except KeyboardInterrupt:
            pass
        except ContextOverflow as error:
            note(f"medusa: {error}; /reset begins a new conversation")
            return
        seconds = time.perf_counter() - start
        pieces.append(detokenizer.end())
        words.put(pieces[-1])
        words.end()
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        if lengths := collected.lengths[0]:
            cut = ", cut at --max-new-tokens" if collected.finish_reasons[0] == "length" else ""
            note(f"[{showing.speed(sum(lengths), len(lengths), seconds)}{cut}]")
