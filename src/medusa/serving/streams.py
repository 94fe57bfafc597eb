"""Streams: server-sent events that stop when the client is gone; and calls that are not streamed, which stop then too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from medusa.serving.problems import problem_of

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """An event with a JSON object."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """An answer as server-sent events. The events are closed when the client is gone, which cancels what makes them.

    Args:
        events: the events, as bytes. A failure among them becomes an event with the error, since the status is out by then.
        keep_alive: seconds of silence before a comment is sent.
        closing: called when the stream is over, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], keep_alive: float, closing: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._keep_alive, self._closing = events, keep_alive, closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            done = await asyncio.gather(sending, gone, return_exceptions=True)
            self._closing()
        if isinstance(done[0], Exception) and not isinstance(done[0], OSError):  # an OSError: the client is gone
            raise done[0]

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(_with_pauses(self._events, self._keep_alive)) as events:  # type: ignore[type-var]
            try:
                async for each in events:
                    await send({"type": "http.response.body", "body": each, "more_body": True})
            except OSError:
                raise
            except Exception as error:
                await send({"type": "http.response.body", "body": event(problem_of(error).body()), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _with_pauses(events: AsyncIterator[bytes], pause: float) -> AsyncIterator[bytes]:
    """The events, and a comment wherever there is none for `pause` seconds."""
    following: asyncio.Task[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
            done, _ = await asyncio.wait((following,), timeout=pause)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                found = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield found
    finally:
        if following is not None:
            following.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await following
        await events.aclose()  # type: ignore[attr-defined]


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled if the client goes away.

    Raises:
        ClientDisconnect: it has gone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
