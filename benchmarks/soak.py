"""A soak: many clients ask, leave, send nonsense and crowd the queue; nothing may be lost or mixed, nor memory grow.

    python benchmarks/soak.py [MODEL] [--clients 200] [--minutes 10] [--json results/soak.json]

Known answers, asked alone at the start, have to come back the same out of the crowd. The script fails (status 1) if a call gets
an answer that it should not get, if a known answer differs, or if requests are still running at the end. The server is
`medusa serve` in float32, in a process of its own, unless `--url` names one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serve import Answered, ask, prompts, quantile, server

BAD: tuple[dict[str, Any], ...] = ({"temperature": 9}, {"messages": []}, {"model": "other"}, {"max_tokens": 10**7}, {"n": 0})


@dataclass
class Seen:
    """What all clients have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    answers: list[Answered] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds since the start, MiB of the server


class Soak:
    """The clients.

    Args:
        known: questions with their seeds and limits, and the answers that they get alone.
    """

    def __init__(self, client: httpx.AsyncClient, model: str, known: dict[tuple[str, int, int], str], until: float):
        self._client, self._model, self._known, self._until = client, model, known, until
        self.seen = Seen()

    async def run(self, number: int) -> None:
        """One client, until time is up."""
        chance = random.Random(number)
        while time.monotonic() < self._until:
            act = chance.choices((self._known_one, self._whole, self._leave, self._nonsense), (6, 2, 2, 1))[0]
            try:
                self.seen.outcomes[await act(chance)] += 1
            except httpx.HTTPStatusError as error:
                await self._refused(error.response, chance)
            except (httpx.HTTPError, RuntimeError) as error:
                self.seen.faults.append(f"{act.__name__}: {type(error).__name__} {error}")
            await asyncio.sleep(chance.expovariate(2.0))

    async def _refused(self, response: httpx.Response, chance: random.Random) -> None:
        if response.status_code not in (429, 503) or "retry-after" not in response.headers:
            self.seen.faults.append(f"status {response.status_code}: {response.text[:200]}")
        self.seen.outcomes["refused: share taken" if response.status_code == 429 else "refused: queue full"] += 1
        await asyncio.sleep(chance.uniform(0.5, 2) * float(response.headers.get("retry-after", 1)))

    async def _known_one(self, chance: random.Random) -> str:
        (prompt, seed, tokens), wanted = chance.choice(list(self._known.items()))
        answer = await ask(self._client, self._model, prompt, tokens, seed=seed, temperature=0.8)
        self.seen.answers.append(answer)
        if answer.text != wanted:
            self.seen.faults.append(f"{prompt!r} with seed {seed} got {answer.text!r}, alone {wanted!r}")
        return "streamed"

    async def _whole(self, chance: random.Random) -> str:
        (prompt, seed, tokens), wanted = chance.choice(list(self._known.items()))
        message = [{"role": "user", "content": prompt}]
        body = {"model": self._model, "messages": message, "max_tokens": tokens, "seed": seed, "temperature": 0.8, "n": 2}
        response = await self._client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        if response.json()["choices"][0]["message"]["content"] != wanted:
            self.seen.faults.append(f"{prompt!r} with seed {seed}, not streamed, differs")
        return "whole"

    async def _leave(self, chance: random.Random) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": "Tell me a very long story."}],
            "max_tokens": 400,
        }
        try:
            await asyncio.wait_for(
                self._client.post("/v1/chat/completions", json=body | {"stream": chance.random() < 0.5}),
                chance.uniform(0.01, 2),
            )
        except TimeoutError:
            return "left"
        return "meant to leave"

    async def _nonsense(self, chance: random.Random) -> str:
        body = {"model": self._model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **chance.choice(BAD)}
        content = json.dumps(body).encode()[: None if chance.random() < 0.8 else 20]
        response = await self._client.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        if response.status_code not in (400, 404):
            self.seen.faults.append(f"nonsense got {response.status_code}: {response.text[:200]}")
        return "nonsense refused"


async def soak(url: str, args: argparse.Namespace, process: int | None) -> tuple[Seen, float]:
    """Run all clients; returns what they saw and the seconds that it took the server to be idle again."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        chance, known = random.Random(0), {}
        for prompt in prompts(args.known):
            seed, tokens = chance.randrange(2**40), chance.randint(4, args.tokens)
            known[prompt, seed, tokens] = (await ask(client, model, prompt, tokens, seed=seed, temperature=0.8)).text
        began = time.monotonic()
        crowd = Soak(client, model, known, began + 60 * args.minutes)
        clients = [asyncio.create_task(crowd.run(number)) for number in range(args.clients)]
        while not all(task.done() for task in clients):
            if process is not None:
                crowd.seen.memory.append((time.monotonic() - began, memory(process)))
            await asyncio.wait(clients, timeout=5)
        for task in clients:
            task.result()
        ended = time.monotonic()
        while await running(client) and time.monotonic() < ended + 60:
            await asyncio.sleep(0.1)
        if left := await running(client):
            crowd.seen.faults.append(f"{left:.0f} requests are still running or waiting a minute after the last client left")
        return crowd.seen, time.monotonic() - ended


async def running(client: httpx.AsyncClient) -> float:
    page = (await client.get("/metrics")).text.splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(float(line.split()[-1]) for line in page if line.startswith(names))


def memory(process: int) -> float:
    """MiB that a process holds (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def report(seen: Seen, idle: float, args: argparse.Namespace) -> dict[str, Any]:
    first, gaps = [each.first for each in seen.answers], [gap for each in seen.answers for gap in each.gaps]
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        "clients": args.clients,
        "minutes": args.minutes,
        "outcomes": dict(seen.outcomes),
        "seconds_to_first_token": {name: round(quantile(first, share), 3) for name, share in shares.items()},
        "seconds_between_events": {name: round(quantile(gaps, share), 3) for name, share in shares.items()},
        "seconds_until_idle": round(idle, 1),
        "server_mib": {f"{at:.0f} s": round(size) for at, size in seen.memory[:: max(1, len(seen.memory) // 12)]},
        "faults": len(seen.faults),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--known", type=int, default=24, help="number of answers that are known beforehand")
    parser.add_argument("--serve", default="--dtype float32 --slots 16 --capacity 1024", help="options of medusa serve")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with ExitStack() as stack:
        url, process = args.url, None
        if url is None:
            own = [sys.executable, "-m", "medusa", "serve", args.model, *args.serve.split()]
            url, made = stack.enter_context(server(*own, ready="/ready"))
            process = made.pid
        seen, idle = asyncio.run(soak(url, args, process))
    found = report(seen, idle, args)
    print(json.dumps(found, indent=2))
    for fault in seen.faults[:20]:
        print(fault, file=sys.stderr)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if seen.faults else 0)


if __name__ == "__main__":
    main()
