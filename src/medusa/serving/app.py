"""The application: OpenAI's endpoints, and those with which a server is watched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

import medusa
from medusa.kernels.workers import release_workers
from medusa.serving.answers import Answers
from medusa.serving.calls import Service
from medusa.serving.chat import ChatAnswer, prepare_chat
from medusa.serving.completions import CompletionAnswer, prepare_completion
from medusa.serving.gate import OPEN, Gate, answer
from medusa.serving.page import FILES, add_page
from medusa.serving.problems import Problem, problem_of, problem_of_fields
from medusa.serving.prompts import chat_ids
from medusa.serving.responses import ResponseAnswer, ResponsesRequest, prepare_response
from medusa.serving.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from medusa.serving.streams import EventStream, unless_gone

log = logging.getLogger("medusa.serve")
T = TypeVar("T")
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
    for status, text in (("4XX", "The request cannot be followed."), ("5XX", "The server cannot answer now."))
}
GONE = 499  # for the log: the client went away, and nobody reads the answer


def create_app(service: Service) -> ASGIApp:
    """The server as an ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Medusa",
        version=medusa.__version__,
        docs_url=None,  # it would load scripts from the network
        redoc_url=None,
        responses=PROBLEMS,
        lifespan=lifespan,
    )
    app.state.service = service
    _handle_problems(app)
    _add_answers(app, service)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_watching(app, service)
    add_page(app)
    settings = service.settings
    paths = (*OPEN, *FILES, "/metrics") if settings.open_metrics else (*OPEN, *FILES)
    gated: ASGIApp = Gate(app, settings.api_key, settings.max_body, paths)
    if settings.allowed_origins:
        gated = CORSMiddleware(
            gated,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    return gated


def _handle_problems(app: FastAPI) -> None:
    async def fields(request: Request, error: Any) -> Response:
        return _told(request, problem_of_fields(error.errors()))

    async def http(request: Request, error: Any) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        told = answer(Problem(str(error.detail), error.status_code, code=code))
        told.headers.update(error.headers or {})
        return told

    async def ours(request: Request, error: Any) -> Response:
        return _told(request, problem_of(error))

    async def gone(request: Request, error: Any) -> Response:
        return Response(status_code=GONE)

    app.add_exception_handler(RequestValidationError, fields)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Problem, ours)
    app.add_exception_handler(Exception, ours)


def _told(request: Request, problem: Problem) -> Response:
    if problem.status < 500:
        log.info(
            "%s %s refused: %d %s", request.state.request_id, request.url.path, problem.status, problem.param or problem.code
        )
    return answer(problem)


async def _in_pool(service: Service, request: Request, work: Callable[..., T], *arguments: Any) -> T:
    """Do some work off the event loop, unless the client goes away."""

    def done() -> T:
        try:
            return work(*arguments)
        finally:
            release_workers()  # the engine's thread computes

    return await unless_gone(request, asyncio.get_running_loop().run_in_executor(service.pool, done))


async def _answered(service: Service, request: Request, body: Any, prepare: Callable[..., Any], kind: Any) -> Response:
    """The answer to a body: prepared, submitted, and either streamed or whole."""
    service.check_model(body.model)
    if (body.n or 1) > service.settings.max_answers:
        raise Problem(f"n: {body.n} is more than {service.settings.max_answers} answers", param="n")
    if service.draining:
        raise Problem("the server is shutting down", 503, code="shutting_down", retry_after=5)
    try:
        calls = await _in_pool(service, request, prepare, service, body)
        answers = Answers(service, calls, request.state.request_id, request.url.path, request.state.client)
        answers.submit()
        found = kind(service, body, answers, request.state.request_id)
        if body.stream:
            return EventStream(found.chunks(), service.settings.keep_alive, closing=answers.cancel)
        return JSONResponse(await unless_gone(request, found.whole()))
    except (Problem, ClientDisconnect):
        raise
    except Exception as error:  # a fault of ours: the caller gets an answer, and its connection stays open
        log.exception("%s %s failed", request.state.request_id, request.url.path)
        raise problem_of(error) from error


def _add_answers(app: FastAPI, service: Service) -> None:
    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}

    @app.post("/v1/chat/completions", responses=streamed, response_class=JSONResponse)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answered(service, request, body, prepare_chat, ChatAnswer)

    @app.post("/v1/completions", responses=streamed, response_class=JSONResponse)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answered(service, request, body, prepare_completion, CompletionAnswer)

    @app.post("/v1/responses", responses=streamed, response_class=JSONResponse)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await _answered(service, request, body, prepare_response, ResponseAnswer)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.card()


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        if body.model is not None:
            service.check_model(body.model)
        ids = await _in_pool(service, request, _ids, service, body)
        names = [service.texts.text(token) for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": service.longest, "tokens": ids, "token_strs": names}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
        if body.model is not None:
            service.check_model(body.model)
        size = service.model.vocab_size
        if wrong := [token for token in body.tokens if token >= size]:
            raise Problem(f"tokens: {wrong[0]} is not one of the model's {size} tokens", param="tokens")
        return {"prompt": await _in_pool(service, request, service.tokenizer.decode, body.tokens)}


def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return chat_ids(service.tokenizer, body.messages, add_generation_prompt=body.add_generation_prompt)
    special = body.add_special_tokens is not False
    return list(service.tokenizer(body.prompt, add_special_tokens=special, verbose=False)["input_ids"])


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """Whether the engine works."""
        return Response(status_code=200 if service.engine.alive() else 503)

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        """Whether new requests are taken."""
        return Response(status_code=200 if service.engine.alive() and not service.draining else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": medusa.__version__}
