"""Speed under load: Medusa, plain decoding and `transformers serve`, with 1 to 16 clients that stream chat completions.

    python benchmarks/serve.py [MODEL] [--clients 1 2 4 8 16] [--requests 4] [--tokens 128] [--json results/serve.json]

Every client sends its requests one after another, with prompts of its own; a load has four requests at least. Medusa and plain
decoding are the same server, asked in turn, round by round; transformers' server runs after it, with and without continuous
batching. Tokens are counted by the tokenizer, in the text that arrived, for all alike. Needs the extra `serve`, and
transformers' own extra `serving`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

SUBJECTS = [
    "rain",
    "tea",
    "bridges",
    "bees",
    "chess",
    "salt",
    "the moon",
    "bread",
    "glass",
    "trains",
    "maps",
    "wool",
    "ice",
    "clocks",
    "paper",
    "rivers",
    "copper",
    "olives",
    "dogs",
    "sailing",
    "mountains",
    "milk",
    "soap",
    "radio",
    "cotton",
    "tides",
    "honey",
    "lamps",
    "horses",
    "wheat",
    "kites",
    "stone",
]
LEAST_REQUESTS = 4
QUESTIONS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "What should everybody know about {}?",
    "Why does {} matter?",
)


def prompts(number: int) -> list[str]:
    """Different questions."""
    return [QUESTIONS[each % 4].format(SUBJECTS[each // 4 % len(SUBJECTS)]) + " " * (each // 128) for each in range(number)]


@dataclass
class Answered:
    """A streamed answer as its client saw it; times in seconds."""

    text: str
    first: float  # from sending to the first text
    total: float
    gaps: list[float]  # between events
    tokens: int = 0


async def ask(client: httpx.AsyncClient, model: str, prompt: str, tokens: int, **fields: Any) -> Answered:
    """Stream one answer. Raises httpx.HTTPStatusError if it is refused."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True, **fields}
    start, last, text, times = time.perf_counter(), 0.0, "", []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            await response.aread()
            response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"])
            last = time.perf_counter() - start
            if new := "".join(choice["delta"].get("content") or "" for choice in event["choices"]):
                text += new
                times.append(last)
    return Answered(text, times[0] if times else last, last, [b - a for a, b in pairwise(times)])


async def load(url: str, model: str, clients: int, requests: int, tokens: int, **fields: Any) -> tuple[list[Answered], float]:
    """Let clients ask at a time; returns the answers and the seconds that all took."""
    questions = prompts(clients * requests)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def one(number: int) -> list[Answered]:
            own = questions[number::clients]
            return [await ask(client, model, prompt, tokens, **fields) for prompt in own]

        start = time.perf_counter()
        found = await asyncio.gather(*(one(number) for number in range(clients)))
        return [answer for own in found for answer in own], time.perf_counter() - start


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


@contextmanager
def server(*command: str, ready: str = "/health") -> Iterator[tuple[str, subprocess.Popen]]:
    """A server in a process of its own, for the time of a `with`; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{command[0]} did not start: {log.read().decode(errors='replace')[-2000:]}")
                try:
                    if httpx.get(url + ready, timeout=5).is_success:
                        break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield url, process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def whole_folder(model: str, folder: Path, dtype: str) -> Path:
    """The backbone and tokenizer as a folder that transformers' server can load."""
    from medusa.checkpoints.named import load_backbone, load_tokenizer

    load_backbone(model, dtype, "cpu", False, "none").save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


@dataclass
class Row:
    """One server under one load."""

    server: str
    clients: int
    tokens_per_second: float
    first_p50: float
    first_p95: float
    total_p95: float


class Bench:
    """All rows of a run.

    Args:
        args: the arguments of the command line.
        tokenizer: counts tokens.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Any):
        self.args, self._tokenizer = args, tokenizer
        self.rows: list[Row] = []
        self.texts: dict[tuple[str, int], list[str]] = {}

    def measure(self, url: str, model: str, variants: dict[str, dict[str, Any]]) -> None:
        """Measure the variants of one server in turn, at every load."""
        args = self.args
        for fields in variants.values():
            asyncio.run(load(url, model, 1, 1, 8, temperature=0, **fields))  # nothing is measured on a cold server
        for clients in args.clients:
            answers: dict[str, list[Answered]] = {name: [] for name in variants}
            seconds = dict.fromkeys(variants, 0.0)
            requests = max(args.requests, -(-LEAST_REQUESTS // clients))
            for _ in range(args.rounds if len(variants) > 1 else 1):
                for name, fields in variants.items():
                    found, took = asyncio.run(load(url, model, clients, requests, args.tokens, temperature=0, **fields))
                    answers[name] += found
                    seconds[name] += took
            for name, found in answers.items():
                for each in found:
                    each.tokens = len(self._tokenizer(each.text, add_special_tokens=False).input_ids)
                self.texts[name, clients] = [each.text for each in found]
                row = Row(
                    name,
                    clients,
                    sum(each.tokens for each in found) / seconds[name],
                    quantile([each.first for each in found], 0.5),
                    quantile([each.first for each in found], 0.95),
                    quantile([each.total for each in found], 0.95),
                )
                self.rows.append(row)
                print(json.dumps(asdict(row)), file=sys.stderr, flush=True)

    def table(self) -> Table:
        table = Table("clients", "server", "tokens/s", "of plain", "first token p50", "p95", "answer p95", box=None)
        plain = {row.clients: row.tokens_per_second for row in self.rows if row.server == "plain"}
        for row in sorted(self.rows, key=lambda row: row.clients):
            shown = [f"{each:.2f} s" for each in (row.first_p50, row.first_p95, row.total_p95)]
            share = f"{row.tokens_per_second / plain[row.clients]:.2f}" if row.clients in plain else ""
            table.add_row(str(row.clients), row.server, f"{row.tokens_per_second:.1f}", share, *shown)
        return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=4, help="requests of each client in a round")
    parser.add_argument("--rounds", type=int, default=2, help="times that Medusa and plain decoding take turns")
    parser.add_argument("--tokens", type=int, default=128, help="limit of each answer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--serve", default="", help="further options of medusa serve, such as '--compile'")
    parser.add_argument("--only-medusa", action="store_true", help="leave transformers' server out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from medusa.checkpoints.named import load_tokenizer

    bench = Bench(args, load_tokenizer(args.model))
    own = [sys.executable, "-m", "medusa", "serve", args.model, "--dtype", args.dtype, "--slots", str(max(args.clients))]
    with server(*own, *args.serve.split(), ready="/ready") as (url, _):
        while not re.search(r"^medusa:graphs_left\S* 0", httpx.get(f"{url}/metrics", timeout=600).text, re.MULTILINE):
            time.sleep(1)
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        variants = {"plain": {"plain": True, "cache_prompt": False}, "medusa": {"cache_prompt": False}}  # both read the prompts
        bench.measure(url, name, {variant: {"medusa": fields} for variant, fields in variants.items()})
        speeds = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("medusa:tree_speedup")]
        print("what the server measured of its trees:", *speeds, sep="\n", file=sys.stderr)
    if not args.only_medusa:
        with tempfile.TemporaryDirectory() as folder:
            whole = str(whole_folder(args.model, Path(folder) / "model", args.dtype))
            transformers = [str(Path(sys.executable).parent / "transformers"), "serve", whole, "--dtype", args.dtype]
            for label, extra in (("transformers", []), ("transformers, continuous batching", ["--continuous-batching"])):
                with server(*transformers, *extra) as (url, _):
                    bench.measure(url, whole, {label: {}})
    Console(width=110).print(bench.table())
    same = [bench.texts["plain", clients] == bench.texts["medusa", clients] for clients in args.clients]
    print(f"Medusa's texts are those of plain decoding at {sum(same)} of {len(same)} loads ({args.dtype})")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        made_with = {**vars(args), "json": str(args.json), "cpus": os.cpu_count(), "python": re.split(r"\s", sys.version)[0]}
        args.json.write_text(json.dumps({"made_with": made_with, "rows": [asdict(row) for row in bench.rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
