"""The server under Ray Serve: does it grow, keep sessions together, survive a dead replica, hear cancels, and drain?

Prints one line per claim and exits 1 at the first that does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import ray
from ray import serve

from medusa.data.prompt_sets import held_out_prompts
from medusa.serving.ray import app

SLOTS, QUEUE = 4, 64
SCALING = {"min_replicas": 1, "upscale_delay_s": 1, "metrics_interval_s": 1, "look_back_period_s": 2}
PATIENCE = 300.0  # seconds in which a replica has to come or go


@dataclass
class Stream:
    """What one streamed answer came to."""

    prompt: int
    replica: str = ""  # which answered
    text: str = ""
    error: openai.APIError | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False


class Check:
    """What the claims share: the server's address, the prompts, and plain decoding's answers to them."""

    def __init__(self, url: str, streams: int, new_tokens: int):
        self.url, self.streams, self.new_tokens = url, streams, new_tokens
        self.prompts = [prompt.ids[:64].tolist() for prompt in held_out_prompts()[:8]]
        self.patient = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=PATIENCE)  # tries again by itself
        self.once = self.patient.with_options(max_retries=0)
        self.http = httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=httpx.Limits(max_connections=None))
        self.plain: list[str] = []

    def body(self, prompt: int, **more: Any) -> dict[str, Any]:
        length = {"max_tokens": self.new_tokens, "extra_body": {"ignore_eos": True}}
        return {"model": "embedded", "prompt": self.prompts[prompt], "temperature": 0, **length, **more}

    async def stream(self, found: Stream, client: openai.AsyncOpenAI, session: str = "", **more: Any) -> Stream:
        headers = {"X-Session-Id": session} if session else {}
        try:
            call = client.completions.with_streaming_response.create(
                **self.body(found.prompt, stream=True, extra_headers=headers, **more)
            )
            async with call as response:
                found.replica = response.headers["x-replica"]
                async for chunk in await response.parse():
                    found.text += chunk.choices[0].text
                    found.begun.set()
        except openai.APIError as error:
            found.error = error
        found.begun.set()
        found.ended = True
        return found

    async def many(self, client: openai.AsyncOpenAI) -> tuple[list[Stream], list[asyncio.Task[Stream]]]:
        """As many streams as asked for, each a session of its own."""
        streams = [Stream(number % len(self.prompts)) for number in range(self.streams)]
        return streams, [asyncio.create_task(self.stream(each, client, f"of {i}")) for i, each in enumerate(streams)]

    def exact(self, streams: list[Stream]) -> bool:
        return all(each.error is None and each.text == self.plain[each.prompt] for each in streams)

    # The claims, in order.

    async def grows(self) -> str:
        plain = {"ignore_eos": True, "medusa": {"plain": True}}
        answers = [await self.once.completions.create(**self.body(i, extra_body=plain)) for i in range(len(self.prompts))]
        self.plain = [answer.choices[0].text for answer in answers]
        before, (streams, tasks) = running(), await self.many(self.once)
        await until(lambda: running() == 2, "a second replica")
        await asyncio.gather(*tasks)
        assert before == 1 and self.exact(streams), [each.error for each in streams if each.error]
        return f"{before} replica became 2 under {len(streams)} streams, all of them plain decoding's text"

    async def keeps_sessions(self) -> str:
        answered: dict[str, set[str]] = {}
        for _ in range(3):
            for session in map(str, range(12)):
                found = await self.stream(Stream(0), self.patient, session, max_tokens=4)
                answered.setdefault(session, set()).add(found.replica)
        assert all(len(replicas) == 1 for replicas in answered.values()), answered
        shares = Counter(next(iter(replicas)) for replicas in answered.values())
        assert len(shares) == 2, shares
        return f"12 sessions, {' and '.join(map(str, shares.values()))} on each replica, each on its own three times"

    async def survives(self) -> str:
        streams, tasks = await self.many(self.once)
        await until(lambda: len({each.replica for each in streams if each.text and not each.ended}) == 2, "streams on both")
        killed = next(each.replica for each in streams if each.replica and not each.ended)
        under_way = [each for each in streams if each.replica not in ("", killed) and not each.ended]
        ray.kill(ray.get_actor(next(name for name in actors() if name.endswith(killed)), "serve"), no_restart=True)
        await asyncio.gather(*tasks)
        lost, others = [each for each in streams if each.error], [each for each in streams if not each.error]
        assert self.exact(others) and lost, (len(lost), len(others))
        assert all(getattr(each.error, "code", None) == "replica_lost" for each in lost), [each.error for each in lost]
        cut = sum(bool(each.text) for each in lost)
        assert cut and under_way and not any(each.error for each in under_way), (cut, under_way)
        again = await asyncio.gather(*(self.stream(Stream(each.prompt), self.patient) for each in lost))
        assert self.exact(again), [each.error for each in again if each.error]
        return (
            f"one of 2 replicas killed under {len(streams)} streams: the {len(under_way)} under way on the other and "
            f"{len(others) - len(under_way)} that waited got their text; {cut} were cut off and {len(lost) - cut} refused with "
            f"OpenAI's error `replica_lost`, and all {len(lost)} got their text when they were sent again"
        )

    async def hears_cancels(self) -> str:
        await until(lambda: running() == 2, "the replica's successor")
        before, _ = await self.load("cancelled")
        call = self.http.stream(
            "POST",
            "/v1/completions",
            json={
                "model": "embedded",
                "prompt": self.prompts[0],
                "max_tokens": 900,
                "ignore_eos": True,
                "stream": True,
                "n": 4,
            },
            headers={"X-Session-Id": "cancelled"},
        )
        async with call:
            await self.until_running(4, "cancelled")
        await self.until_running(0, "cancelled")
        after, _ = await self.load("cancelled")
        assert after == before + 4, (before, after)
        return "a client left: its 4 rows were freed, and counted as cancelled"

    async def until_running(self, number: int, session: str) -> None:
        end = time.monotonic() + PATIENCE
        while (load := await self.load(session))[1] != number:
            assert time.monotonic() < end, f"{load[1]} answers run, not {number}"
            await asyncio.sleep(0.05)

    async def load(self, session: str) -> tuple[float, float]:
        """Answers that were cancelled, and those that run, in the replica of a session."""
        lines = (await self.http.get("/metrics", headers={"X-Session-Id": session})).text.splitlines()
        values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
        ended = 'vllm:request_success_total{finished_reason="cancelled",model_name="embedded"}'
        return values.get(ended, 0.0), sum(
            value for name, value in values.items() if name.startswith("vllm:num_requests_running")
        )

    async def refuses(self) -> str:
        number = 2 * 2 * SLOTS + QUEUE + 80
        body = {"model": "embedded", "prompt": self.prompts[0], "max_tokens": 8, "temperature": 0}
        answers = await asyncio.gather(*(self.http.post("/v1/completions", json=body) for _ in range(number)))
        statuses = Counter(answer.status_code for answer in answers)
        refused = [answer for answer in answers if answer.status_code == 503]
        assert refused and statuses.keys() == {200, 503}, statuses
        assert all(answer.headers["retry-after"] == "1" for answer in refused)
        assert {answer.json()["error"]["code"] for answer in refused} == {"overloaded"}
        return f"{number} calls at once: {statuses[200]} answered, {statuses[503]} refused with 503 and Retry-After: 1"

    async def drains(self) -> str:
        sessions, streams = {}, []
        for session in map(str, range(100)):
            found = await self.stream(Stream(0), self.patient, session, max_tokens=1)
            sessions.setdefault(found.replica, session)
            if len(sessions) == 2:
                break
        for session in sessions.values():
            streams.append(Stream(0))
            asyncio.get_running_loop().create_task(self.stream(streams[-1], self.once, session, max_tokens=900, n=4))
        fewer = asyncio.create_task(asyncio.to_thread(deploy, 1))
        await until(lambda: running() == 1, "a replica to be stopped")
        left = [each for each in streams if not each.ended]
        stopping = states().get("STOPPING", 0)
        await until(lambda: all(each.ended for each in streams), "the streams to end")
        assert len(left) == 2 and stopping == 1 and not any(each.error for each in streams), (left, stopping, streams)
        await until(lambda: not states().get("STOPPING"), "the replica to be gone")
        await fewer
        return "2 replicas became 1 under a stream on each: the one that left finished its stream first"


def deploy(most: int) -> None:
    """Deploy the server, or change how many replicas it may have at most."""
    options = {"model": "embedded", "dtype": "float32", "slots": SLOTS, "capacity": 1024, "max_queue": QUEUE}
    scaling = {"autoscaling_config": {**SCALING, "max_replicas": most}}
    serve.run(app({**options, "shutdown_timeout": 120.0, "deployment": scaling}), name="medusa")


def states() -> dict[str, int]:
    """Number of replicas in each state."""
    return serve.status().applications["medusa"].deployments["Medusa"].replica_states


def running() -> int:
    return states().get("RUNNING", 0)


def actors() -> list[str]:
    return [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if "Medusa" in each["name"]]


async def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.1)


async def run(check: Check) -> None:
    for claim in (check.grows, check.keeps_sessions, check.survives, check.hears_cancels, check.refuses, check.drains):
        print(f"{claim.__name__.replace('_', ' ')}: {await claim()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96)
    args = parser.parse_args()
    with socket.socket() as free, tempfile.TemporaryDirectory(prefix="ray") as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        # A cluster of its own, whatever else runs here.
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder, namespace="serve")
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            deploy(2)
            asyncio.run(run(Check(f"http://127.0.0.1:{port}", args.streams, args.new_tokens)))
        except AssertionError as error:
            sys.exit(f"WRONG: {error}")
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
