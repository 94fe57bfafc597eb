"""medusa generate: continue a prompt."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa.cli import common, prompting, showing
from medusa.runs.console import note

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.model import MedusaModel


def generate_command(
    model: common.ModelArgument = "embedded",
    prompt: Annotated[str | None, typer.Argument(help="The prompt (default: stdin).", show_default=False)] = None,
    prompt_file: common.PromptFileOption = None,
    chat: common.ChatOption = None,
    heads: common.HeadsOption = None,
    tree: common.TreeOption = None,
    max_new_tokens: common.MaxNewTokens = 256,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    min_p: common.MinP = None,
    repetition_penalty: common.Penalty = None,
    acceptance: common.Acceptance = "exact",
    epsilon: common.Epsilon = 0.09,
    delta: common.Delta = 0.3,
    seed: common.Seed = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop at this string; repeatable.")] = None,
    quantization: common.QuantizationOption = "none",
    gguf_file: common.GgufOption = None,
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    compile: common.CompileOption = False,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Answer a prompt (chat model) or continue it (any other model). Text is streamed to stdout, statistics go to stderr."""
    import torch

    from medusa.checkpoints import named
    from medusa.data.prompts import as_conversation, prompt_ids

    if prompt is None and prompt_file is None:
        prompting.refuse_prompt_as_model(model, "name the model first: medusa generate MODEL PROMPT")
    model = common.with_file(model, gguf_file, revision)
    text = prompting.read_prompt(prompt, prompt_file)
    options = common.sampling_options(temperature, top_k, top_p, min_p, repetition_penalty, acceptance, epsilon, delta, seed)
    named.require_heads(model, heads, tree == "root")
    tokenizer = named.load_tokenizer(model, trust_remote_code)
    ids = torch.tensor([prompt_ids(tokenizer, as_conversation(tokenizer, text, chat, model) or text)])
    named.check_room(model, ids.shape[1], max_new_tokens, trust_remote_code)
    medusa = named.load_model(model, heads, tree, dtype, device, trust_remote_code, quantization)
    named.note_advice_on_tree(medusa, model, heads, tree)
    how = {"max_new_tokens": max_new_tokens, "stop_strings": stop, "tokenizer": tokenizer, "compile": compile, **options}
    record = _generate(medusa, tokenizer, ids, not as_json, how)
    if as_json:
        print(json.dumps(record))
        return
    tokens, steps, seconds = record["new_tokens"], record["steps"], record["seconds"]
    note(f"{tokens} tokens in {seconds:.2f} s: {showing.speed(tokens, steps, seconds)} ({record['finish_reason']})")
    showing.note_low_rate(len(medusa.tree), tokens, steps)


def _generate(medusa: MedusaModel, tokenizer: Any, ids: Tensor, show: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Continue token ids (1, P), and return the record that --json prints.

    Args:
        show: whether to write the text to stdout as it is generated.
        options: options of `MedusaModel.stream`.
    """
    from medusa.generation import Collected
    from medusa.text import Detokenizer

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
