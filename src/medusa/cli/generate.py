"""medusa generate: continue a prompt."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from medusa.cli import common, prompting, showing
from medusa.runs.console import note


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
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End at this string; repeatable.")] = None,
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
    from medusa.generation import Collected
    from medusa.text import Detokenizer

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
    detokenizer = Detokenizer(tokenizer, ids[0].tolist())
    collected, pieces = Collected(), []
    start = time.perf_counter()
    steps = medusa.stream(
        ids,
        ids.new_ones(ids.shape),  # a single prompt has no padding, whatever ids are in it
        max_new_tokens=max_new_tokens,
        stop_strings=stop,
        tokenizer=tokenizer,
        compile=compile,
        **options,
    )
    for step in collected.follow(steps):
        pieces.append(detokenizer.put(step.tokens[0]))
        if not as_json:
            sys.stdout.write(pieces[-1])
            sys.stdout.flush()
    pieces.append(detokenizer.end())
    seconds = time.perf_counter() - start
    tokens, lengths, finish_reason = collected.tokens[0], collected.lengths[0], collected.finish_reasons[0]
    record = {
        "text": "".join(pieces),
        "token_ids": tokens,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(tokens),
        "steps": len(lengths),
        "acceptance_lengths": lengths,
        "acceleration_rate": len(tokens) / len(lengths),
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
        "finish_reason": finish_reason,
    }
    if as_json:
        print(json.dumps(record))
        return
    print(pieces[-1])
    note(f"{len(tokens)} tokens in {seconds:.2f} s: {showing.speed(len(tokens), len(lengths), seconds)} ({finish_reason})")
    showing.note_low_rate(len(medusa.tree), len(tokens), len(lengths))
