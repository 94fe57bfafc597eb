"""What else runs the same model on the same machine: transformers, our loops, and llama.cpp, in one run on the same prompts.

    (cd integration/peers && npm install)
    python benchmarks/peers.py smollm2 --prompts mt_bench.jsonl --limit 8 -t 0 0.7 --llama-cpp integration/peers

Decoders take turns on every prompt. transformers' generate and prompt lookup, our plain loop and Medusa run in bfloat16, ours
also compiled, and compiled on int8 and int4 weights (int8-dynamic, int4-dynamic); llama.cpp reads the GGUF file as it is (its
quantisation is printed), plainly and with its own prompt lookup. Texts of different quantisations differ, so tokens/s are
compared, and the number of tokens is printed. Ratios to llama.cpp's plain loop and to ours have 95 % bootstrap intervals over
prompts. Each process has the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from medusa import MedusaModel, MedusaTree, __version__, load_tree
from medusa.checkpoints.hub import find_model
from medusa.checkpoints.loading import load_tokenizer
from medusa.checkpoints.named import quiet_transformers
from medusa.checkpoints.quantization import quantized
from medusa.data.prompt_sets import Prompter, read_questions
from medusa.evaluation.decoders import Decoded, Decoder, MedusaDecoder, TransformersDecoder
from medusa.evaluation.measurement import Measurement, compare_decoders, estimate


class LlamaCppDecoder:
    """llama.cpp in a process of node-llama-cpp (integration/peers).

    Args:
        folder: the folder in which `npm install` was run.
        mode: "plain" or "lookup", its own prompt lookup.
    """

    def __init__(self, folder: Path, file: Path, mode: str, max_new_tokens: int, temperature: float, seed: int):
        command = ["node", "llama.mjs", str(file.resolve()), str(torch.get_num_threads()), mode]
        self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._options = {"limit": max_new_tokens, "temperature": temperature, "seed": seed}
        self._read()  # it is ready

    def prepare(self, ids: Tensor) -> None:
        pass

    def __call__(self, ids: Tensor) -> Decoded:
        assert self._process.stdin is not None
        print(json.dumps({"ids": ids[0].tolist(), **self._options}), file=self._process.stdin, flush=True)
        got = self._read()
        tokens = got["tokens"]
        return Decoded([tokens], [[1] * len(tokens)], len(tokens), got["first"], got["first"], prefill_tokens=1)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"llama.cpp ended with status {self._process.wait()}; run `npm install` in integration/peers")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def decoders_of(
    args: argparse.Namespace, temperature: float, file: Path | None, models: dict[str, MedusaModel]
) -> dict[str, Decoder]:
    plain, count = MedusaTree([]), args.max_new_tokens
    ours: dict[str, Any] = {"do_sample": True, "temperature": temperature, "seed": args.seed} if temperature else {}
    theirs: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    found: dict[str, Decoder] = {}
    model = models["bfloat16"]
    found["transformers generate"] = TransformersDecoder(model, count, seed=args.seed, **theirs)
    found["transformers prompt lookup"] = TransformersDecoder(model, count, guesses=3, seed=args.seed, **theirs)
    tree = load_tree(args.tree) if args.tree else None
    for name, model in models.items():
        for compiled in (False, True) if name == "bfloat16" else (True,):
            label = f"{name}{', compiled' if compiled else ''}"
            found[f"plain, {label}"] = MedusaDecoder(model, count, plain, compile=compiled, **ours)
            found[f"Medusa, {label}"] = MedusaDecoder(model, count, tree, compile=compiled, **ours)
    if file is not None and args.llama_cpp is not None:
        for mode in ("plain", "lookup"):
            found[f"llama.cpp {mode}"] = LlamaCppDecoder(args.llama_cpp, file, mode, count, temperature, args.seed)
    return found


def show(results: dict[str, Measurement], title: str) -> list[dict[str, Any]]:
    table = Table(title=title, title_justify="left")
    for column in ("", "tokens/s", "of llama.cpp plain", "of our compiled plain", "tokens per step", "tokens"):
        table.add_column(column, justify="right" if column else "left")
    rows = []
    for name, measured in results.items():
        row: dict[str, Any] = {"decoder": name, "tokens": measured.tokens, "tokens_per_step": measured.acceleration_rate}
        row["tokens_per_second"] = estimate(lambda own: own.tokens_per_second, measured)
        for against in ("llama.cpp plain", "plain, bfloat16, compiled"):
            if against in results:
                ratio = estimate(lambda own, other: own.tokens_per_second / other.tokens_per_second, measured, results[against])
                row[f"of {against}"] = ratio
        rows.append(row)
        ratios = [row.get("of llama.cpp plain"), row.get("of plain, bfloat16, compiled")]
        shown = [f"{r.value:.2f} ({r.low:.2f}-{r.high:.2f})" if r and r.low is not None else "" for r in ratios]
        speed = f"{row['tokens_per_second'].value:.1f}"
        table.add_row(name, speed, *shown, f"{measured.acceleration_rate:.2f}", str(measured.tokens))
    Console(file=sys.stdout, width=110).print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--heads")
    parser.add_argument("--tree", help="tree file [that of the heads]")
    parser.add_argument("--prompts", nargs="+", required=True, help="files of prompts, in any format")
    parser.add_argument("--limit", type=int, default=8, help="number of prompts")
    parser.add_argument("--max-new-tokens", "-n", type=int, default=128)
    parser.add_argument("--temperature", "-t", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llama-cpp", type=Path, help="the folder integration/peers, after `npm install` there")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    quiet_transformers()
    source = find_model(args.model)
    file = source.folder / source.gguf_file if source.gguf_file is not None else None
    models = {
        name: MedusaModel.from_pretrained(args.model, args.heads, dtype=torch.bfloat16, **quantized(kind))
        for name, kind in (("bfloat16", "none"), ("int8", "int8-dynamic"), ("int4", "int4-dynamic"))
    }
    prompter = Prompter(load_tokenizer(source), models["bfloat16"].eos_token_ids)
    questions = [question for path in args.prompts for question in read_questions(path)][: args.limit]
    batches = [torch.tensor([prompter.ids(question)]) for question in questions]
    found: dict[str, Any] = {"medusa": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    found |= {"model": args.model, "gguf": file.name if file else None, "cpus": os.cpu_count()}
    for temperature in args.temperature:
        decoders = decoders_of(args, temperature, file, models)
        for decoder in decoders.values():
            decoder.prepare(batches[0])
        with tqdm(
            total=len(decoders) * len(batches) * args.rounds, desc=f"temperature {temperature:g}", dynamic_ncols=True
        ) as bar:
            results = compare_decoders(decoders, batches, args.rounds, on_progress=bar.update)
        for decoder in decoders.values():
            if isinstance(decoder, LlamaCppDecoder):
                decoder.close()
        title = f"{args.model}, {len(batches)} prompts of {args.max_new_tokens} tokens at most, temperature {temperature:g}"
        found[f"temperature {temperature:g}"] = show(results, title + (f"; llama.cpp reads {file.name}" if file else ""))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2, default=lambda value: value._asdict()) + "\n")


if __name__ == "__main__":
    main()
