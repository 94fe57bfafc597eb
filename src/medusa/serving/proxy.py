"""The proxy's side: what a proxy reports as text, or by breaking the connection, reaches clients in OpenAI's shape."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa.serving.gate import answer
from medusa.serving.problems import Problem
from medusa.serving.streams import DONE, event

LOST = "the replica that answered has ended; send the request again"
REASONS = {
    404: ("nothing is served at this path", "not_found"),
    408: ("the request took too long", "timeout"),
    503: ("all replicas are busy or none is ready; send the request again later", "overloaded"),
}


class Proxied:
    """ASGI around a proxy whose replicas run the server's application.

    A stream whose replica ends gets an event with the error, and an answer that had not begun the status 503 with Retry-After,
    so that clients send the request again by themselves.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # the proxy's own endpoints
            await self._app(scope, receive, send)
            return
        begun: Headers | None = None
        ended = False

        async def watched(message: Message) -> None:
            nonlocal begun, ended
            if ended:  # the text of an error that has been answered already
                return
            if message["type"] == "http.response.start":
                begun = Headers(raw=message["headers"])
                if message["status"] >= 400 and begun.get("content-type", "").startswith("text/plain"):
                    ended = True
                    await answer(_problem(message["status"], begun))(scope, receive, send)
                    return
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, watched)
        lost = Problem(LOST, 503, code="replica_lost", retry_after=1)
        if begun is None:
            await answer(lost)(scope, receive, send)
        elif not ended and begun.get("content-type", "").startswith("text/event-stream"):
            await send({"type": "http.response.body", "body": event(lost.body()) + DONE, "more_body": False})


def _problem(status: int, headers: Headers) -> Problem:
    text, code = REASONS.get(status, ("the proxy failed to answer", "internal_error"))
    seconds = headers.get("retry-after", "1")
    return Problem(text, status, code=code, retry_after=int(seconds) if status in (429, 503) else None)
