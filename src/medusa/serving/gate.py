"""The gate in front of all endpoints: keys and clients, sizes of bodies, ids of requests."""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa.serving.problems import Problem

OPEN = ("/health", "/ready")  # whoever watches the server has no key
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Gate:
    """Pure ASGI, so that the endpoints still hear when a client goes away.

    Args:
        api_keys: keys of which a client must send one; none: everybody may call.
        max_body: bytes of the largest body.
        open_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], max_body: int, open_paths: Sequence[str] = OPEN):
        self._app, self._max_body, self._open = app, max_body, frozenset(open_paths)
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            scope["state"]["client"] = self._client(scope, headers)
            receive = await self._whole_body(headers, receive)
        except Problem as problem:
            await answer(problem)(scope, receive, named)
            return
        await self._app(scope, receive, named)

    def _client(self, scope: Scope, headers: Headers) -> str:
        """Who calls: the number of its key, or its address where no key is needed."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._digests or path in self._open or scope["method"] == "OPTIONS":
            return str((scope.get("client") or ("",))[0])
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Every key is compared, in constant time: the time tells neither how far nor which one matched.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Problem("the API key is missing or wrong; send Authorization: Bearer KEY", 401, code="invalid_api_key")
        return f"key {matches.index(True)}"

    async def _whole_body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the body, so that one that is too large is refused whatever its header says."""
        declared = headers.get("content-length", "0")
        chunks, size, more = [], 0, True
        if declared.isdecimal() and len(declared) < 20 and int(declared) <= self._max_body:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return _replay([message], receive)
                chunks.append(message.get("body", b""))
                size, more = size + len(chunks[-1]), message.get("more_body", False)
                if size > self._max_body:
                    break
        if more or size > self._max_body:
            raise Problem(f"the body has more than {self._max_body} bytes", 413, code="body_too_large")
        return _replay([{"type": "http.request", "body": b"".join(chunks), "more_body": False}], receive)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    async def replayed() -> Message:
        return messages.pop(0) if messages else await receive()

    return replayed


def answer(problem: Problem) -> JSONResponse:
    """The HTTP answer that tells a problem."""
    body: dict[str, Any] = problem.body()
    headers = problem.headers | ({"WWW-Authenticate": "Bearer"} if problem.status == 401 else {})
    return JSONResponse(body, problem.status, headers)
