"""medusa tune: calibrate the heads and search their tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medusa.cli import common
from medusa.errors import InvalidInput


def tune_command(
    model: common.ModelArgument = "embedded",
    prompts: Annotated[Path | None, typer.Option("--prompts", help='JSONL with "text" or "input_ids".')] = None,
    heads: common.HeadsOption = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Size of the tree, the root included.")] = 24,
    max_prompts: Annotated[int, typer.Option("--max-prompts", help="Prompts used.")] = 64,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each prompt used.")] = 256,
    max_new_tokens: common.MaxNewTokens = 128,
    temperature: common.Temperature = 0.0,
    ranks: Annotated[int, typer.Option("--ranks", help="Guesses of each head that are scored.")] = 16,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the tree; calibration.json goes beside it.")
    ] = None,
    independent: Annotated[
        bool, typer.Option("--independent", help="Take heads to err independently (the paper's search).")
    ] = False,
    quantization: common.QuantizationOption = "none",
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Score the heads on what the backbone says and search the best tree of a size (paper 2.3.3)."""
    if prompts is None:
        raise InvalidInput("no prompts; pass --prompts FILE.jsonl with text like the model will see")
    if temperature < 0:
        raise InvalidInput(f"temperature is {temperature}, wanted 0 (greedy) or more")
    for name, value in (("nodes", nodes), ("max-prompts", max_prompts), ("prompt-tokens", prompt_tokens), ("ranks", ranks)):
        if value < 1:
            raise InvalidInput(f"--{name} is {value}, wanted at least 1")
    from rich.console import Console
    from rich.progress import Progress

    from medusa.metrics import expected_acceptance_length
    from medusa.search import search_joint_tree, search_tree
    from medusa.training.data import load_rows
    from medusa.tuning.calibrate import calibrate

    medusa = common.load_model(model, heads, None, dtype, device, trust_remote_code, quantization)
    tokenizer = common.load_tokenizer(model, trust_remote_code)
    rows = load_rows(prompts, tokenizer, prompt_tokens, medusa.vocab_size)
    blocks = [row.ids for row in rows if len(row) >= min(32, prompt_tokens)]
    if not blocks:
        raise InvalidInput(f"{prompts} holds no text of at least {min(32, prompt_tokens)} tokens")
    stride = max(1, len(blocks) // max_prompts)
    chosen = [block.long() for block in blocks[::stride][:max_prompts]]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("calibrating", total=len(chosen))
        calibration = calibrate(medusa, chosen, max_new_tokens, ranks, temperature, on_progress=lambda: progress.advance(task))
    if independent:
        tree = search_tree(calibration.accuracies, nodes)
        expected = expected_acceptance_length(tree, calibration.accuracies)
    else:
        tree = search_joint_tree(calibration.paths, nodes)
        expected = 1 + sum(count for path, count in calibration.paths if path in tree.paths) / calibration.positions
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        tree.save(output)
        record = {"prompts": prompts.name, "temperature": temperature, **calibration.to_dict()}
        (output.parent / "calibration.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        common.note(f"tree saved as {output}, the accuracies beside it as calibration.json")
    if as_json:
        paths = [list(path) for path in tree.paths]
        print(json.dumps({"paths": paths, "expected_acceptance_length": expected, "calibration": calibration.to_dict()}))
        return
    for k, row in enumerate(calibration.accuracies, 1):
        print(f"head {k}: " + "  ".join(f"{accuracy:.3f}" for accuracy in row[:8]))
    print(f"{len(tree)} nodes, depth {tree.depth}: {expected:.2f} tokens a step expected")
