"""medusa generate: continue a prompt."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, prompting, showing
from medusa.config import option
from medusa.errors import InvalidInput
from medusa.runs.console import note
from medusa.runs.files import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.model import MedusaModel
    from medusa.processors.grammar import Grammar


@dataclass(frozen=True)
class Form:
    """What the text must look like; at most one is given."""

    json_schema: Path | None = option(None, "Generate JSON that conforms to the JSON schema in this file.")
    regex: str | None = option(None, "Generate text that matches this regular expression.")
    choice: tuple[str, ...] = option((), "Generate one of these texts; repeatable.")

    def __post_init__(self) -> None:
        if sum(form not in (None, ()) for form in vars(self).values()) > 1:
            raise InvalidInput("give one of --json-schema, --regex and --choice")

    def grammar(self, tokenizer: Any) -> Grammar | None:
        from medusa.processors.grammar import Grammar

        if self.json_schema is not None:
            return Grammar.json(read_text(self.json_schema, InvalidInput), tokenizer)
        if self.regex is not None:
            return Grammar.regex(self.regex, tokenizer)
        return Grammar.choice(self.choice, tokenizer) if self.choice else None


@common.with_options(Form, common.Sampling, common.Loading)
def generate_command(
    model: common.ModelArgument = "embedded",
    prompt: Annotated[str | None, typer.Argument(help="The prompt (default: stdin).", show_default=False)] = None,
    prompt_file: common.PromptFileOption = None,
    chat: common.ChatOption = None,
    tree: common.TreeOption = None,
    max_new_tokens: common.MaxNewTokens = 256,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this string; repeatable.")] = None,
    quantization: common.QuantizationOption = "none",
    tp: common.TpOption = 1,
    compile: common.CompileOption = False,
    as_json: common.JsonOption = False,
    **options: Any,
) -> None:
    """Answer a prompt (chat model) or continue it (any other model). Text is streamed to stdout; statistics go to stderr."""
    import torch

    from medusa.checkpoints import named, parallel
    from medusa.data.prompts import as_conversation, prompt_ids

    if prompt is None and prompt_file is None:
        prompting.refuse_prompt_as_model(model, "name the model first: medusa generate MODEL PROMPT")
    model, sampling, form = common.full_name(model, options), common.sampling_options(options), common.take(Form, options)
    text, trusted = prompting.read_prompt(prompt, prompt_file), options["trust_remote_code"]
    named.require_heads(model, options["heads"], tree == "root")
    tokenizer = named.load_tokenizer(model, trusted)
    ids = torch.tensor([prompt_ids(tokenizer, as_conversation(tokenizer, text, chat, model) or text)])
    named.check_room(model, ids.shape[1], max_new_tokens, trusted)
    sampling["grammar"] = form.grammar(tokenizer)
    medusa = parallel.load_model(model, tp, tree=tree, quantization=quantization, **options)
    named.note_advice_on_tree(medusa, model, options["heads"], tree)
    how = {"max_new_tokens": max_new_tokens, "stop_strings": stop, "tokenizer": tokenizer, "compile": compile, **sampling}
    record = _generate(medusa, tokenizer, ids, not as_json, how)
    if as_json:
        print(json.dumps(record))
        return
    tokens, steps, seconds = record["new_tokens"], record["steps"], record["seconds"]
    note(f"{tokens} tokens in {seconds:.2f} s: {showing.speed(tokens, steps, seconds)} ({record['finish_reason']})")
    showing.note_low_rate(len(medusa.tree), tokens, steps)


def _generate(medusa: MedusaModel, tokenizer: Any, ids: Tensor, show: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Continue token ids (1, P), showing the text as it is generated if wanted, and return the record that --json prints."""
    from medusa.generation.mixin import Collected
    from medusa.generation.text import Detokenizer

    detokenizer, collected, pieces = Detokenizer(tokenizer, ids[0].tolist()), Collected(), list[str]()
    start = time.perf_counter()
    # A single prompt has no padding, whatever ids are in it.
    for step in collected.follow(medusa.stream(ids, ids.new_ones(ids.shape), **options)):
        pieces.append(detokenizer.put(step.tokens[0]))
        if show:
            print(pieces[-1], end="", flush=True)
    pieces.append(detokenizer.end())
    seconds = time.perf_counter() - start
    if show:
        print(pieces[-1])
    tokens, lengths = collected.tokens[0], collected.lengths[0]
    return {
        "text": "".join(pieces),
        "token_ids": tokens,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(tokens),
        "steps": len(lengths),
        "acceptance_lengths": lengths,
        "acceleration_rate": len(tokens) / len(lengths),
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
        "finish_reason": collected.finish_reasons[0],
    }
