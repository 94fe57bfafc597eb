"""The running server: uvicorn around the application, which drains before it stops."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from dataclasses import replace
from typing import Any

import uvicorn

from medusa.checkpoints import named, parallel
from medusa.checkpoints.hub import with_file
from medusa.errors import InvalidInput
from medusa.model import MedusaModel
from medusa.runs.console import note
from medusa.serving.app import create_app
from medusa.serving.calls import Service
from medusa.serving.engine import Engine
from medusa.serving.memory import pool_size
from medusa.serving.metrics import Metrics
from medusa.serving.settings import Launch, ServerSettings

KEY = "MEDUSA_API_KEY"
LOG = {"format": "%(asctime)s %(levelname)s %(message)s", "datefmt": "%H:%M:%S"}
IDLE = 75  # seconds after which an idle connection is closed: clients (5) and proxies (60) close theirs before, and so never
# send a call into a connection that is just being closed


class Server(uvicorn.Server):
    """uvicorn, with one more stage: after the first signal, running requests finish while new ones are refused."""

    def __init__(self, service: Service, config: uvicorn.Config):
        super().__init__(config)
        self._service = service
        self._deadline = 0.0

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            note(f"{self._service.name} is served at {self.address}/v1; Ctrl-C ends it")

    @property
    def address(self) -> str:
        """Where clients reach it."""
        settings = self._service.settings
        if settings.uds is not None:
            return f"unix:{settings.uds}"
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http{'s' if settings.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal drains; the second ends at once."""
        if self._service.draining:
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        note("running requests finish, new ones are refused; a second signal ends at once")
        self._deadline = time.monotonic() + self._service.settings.shutdown_timeout

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and not self.should_exit:
            load = self._service.engine.load()
            idle = not (load.running or load.waiting)
            self.should_exit = idle or time.monotonic() > self._deadline
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        # What has not finished is cancelled, and its clients are told, before their connections are closed.
        await asyncio.to_thread(self._service.engine.close, False)
        await super().shutdown(sockets)


def make_server(service: Service) -> Server:
    settings = service.settings
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        uds=settings.uds,
        root_path=settings.root_path,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        access_log=False,  # each request has its own line
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=IDLE,
    )
    return Server(service, config)


def make_service(
    model: MedusaModel,
    tokenizer: Any,
    name: str,
    settings: ServerSettings,
    slots: int | None = None,
    capacity: int | None = None,
    compiled: bool = False,
) -> Service:
    """An engine for a model, with what the endpoints need.

    Args:
        name: the model's name for clients.
        slots, capacity: see `pool_size`.
        compiled: see `Engine`.

    Raises:
        InvalidInput: the pool does not fit the memory.
    """
    size = pool_size(model, slots, capacity)
    note(f"{size.slots} slots of {size.capacity} tokens: {size.bytes / 2**20:.0f} MiB of keys and values")
    engine = Engine(
        model,
        size.slots,
        size.capacity,
        queue=settings.max_queue,
        compiled=compiled,
        measured=settings.measure_trees,
    )
    return Service(engine, model, tokenizer, name, settings, Metrics(name, engine))


def check_address(settings: ServerSettings) -> None:
    """Refuse an address that cannot be listened on, before a model is loaded.

    Raises:
        InvalidInput: it is taken, or not this machine's.
    """
    if settings.uds:
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise InvalidInput(f"cannot listen on {where}: {error.strerror}; choose another --port or --host") from None


def launched(launch: Launch, settings: ServerSettings) -> Service:
    """The model, loaded, in an engine that runs; one line of the log for each request goes to stderr.

    Raises:
        MedusaError: something is missing, broken, or does not fit the memory.
    """
    if not settings.api_key and os.environ.get(KEY):
        settings = replace(settings, api_key=(os.environ[KEY],))
    full = with_file(launch.model, launch.gguf_file, launch.revision)
    named.require_heads(full, launch.heads, launch.tree == "root")
    tokenizer = named.load_tokenizer(full, launch.trust_remote_code)
    model = parallel.load_model(
        full,
        launch.tp,
        heads=launch.heads,
        tree=launch.tree,
        dtype=launch.dtype,
        device=launch.device,
        trust_remote_code=launch.trust_remote_code,
        quantization=launch.quantization,
    )
    named.note_advice_on_tree(model, full, launch.heads, launch.tree)
    log_to_stderr()
    name = settings.served_model_name or launch.model
    return make_service(model, tokenizer, name, settings, launch.slots, launch.capacity, launch.compile)


def run(service: Service) -> None:
    """Serve until a signal ends it.

    Raises:
        InvalidInput: the address cannot be listened on.
    """
    server = make_server(service)
    try:
        server.run()
    finally:
        service.engine.close(drain=False, timeout=10.0)
    if not server.started:
        raise InvalidInput(f"cannot listen on {service.settings.host}:{service.settings.port}; choose another --port or --host")


def log_to_stderr() -> None:
    """One line for each request, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(LOG["format"], LOG["datefmt"]))
    log = logging.getLogger("medusa.serve")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
