"""Ray Serve: replicas of the server, their number by load, each session on the same one.

`serve run medusa.serving.ray:app model=smollm2 slots=8`; in Python, `serve.run(app({"model": "smollm2", "slots": 8}))`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa.errors import ConfigError, InvalidInput, one_line
from medusa.runs.console import note
from medusa.runs.files import read_yaml
from medusa.serving.proxy import Proxied
from medusa.serving.settings import MOST_SLOTS, Launch, ServerSettings, options_in, parted

PROXYS = ("host", "port", "uds", "root_path", "ssl_certfile", "ssl_keyfile")  # options that only `medusa serve` follows
ARGUMENTS = "the application's arguments"
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def app(options: dict[str, Any]) -> Any:
    """The application for Ray Serve, which calls this with the arguments of `serve run` or of a Serve config file.

    Args:
        options: those of `medusa serve`, by name; `config`, a YAML file of them, which the others override; and `deployment`,
            a mapping of options of Serve's deployments, which override ours. Texts are read as YAML, as in such a file.

    Raises:
        MedusaError: an option is unknown or wrong, or Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError:  # also ray without what its own extra `serve` installs
        raise InvalidInput("medusa.serving.ray needs ray[serve]: pip install 'medusa-decoding[ray]'") from None
    try:
        given = {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in options.items()}
    except yaml.YAMLError as error:
        raise InvalidInput(f"{ARGUMENTS} are not YAML: {one_line(error)}") from None
    path, own = given.pop("config", None), given.pop("deployment", {})
    found = {} if path is None else options_in(read_yaml(str(path), InvalidInput) or {}, str(path))
    launch, settings = parted(found | options_in(given, ARGUMENTS), ARGUMENTS)
    if theirs := [name for name in PROXYS if getattr(settings, name) != getattr(ServerSettings(), name)]:
        note(f"{', '.join(theirs)}: not followed; Ray Serve's proxies listen where its http_options say")
    # Read by the proxies when they start. On a cluster that already runs, its nodes have to set it.
    os.environ.setdefault(CALLBACK, "medusa.serving.ray:middlewares")
    chosen = deployment(launch, settings, own)
    try:
        deployed = serve.deployment(name="Medusa", **chosen)(serve.ingress()(Replica))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"deployment: {one_line(error)}") from None
    return deployed.bind(launch, settings)


def deployment(launch: Launch, settings: ServerSettings, own: Any) -> dict[str, Any]:
    """The options of the deployment.

    Args:
        own: options that override ours; of mappings, key by key.
    """
    if not isinstance(own, Mapping):
        raise ConfigError(f"deployment is {own!r}, expected a mapping of options of Ray Serve's deployments")
    slots = launch.slots or MOST_SLOTS
    ours: dict[str, Any] = {
        "autoscaling_config": {"target_ongoing_requests": slots},
        # Enough to refill its slots at once. More go to the next replica, though it has not seen the session; if all have as
        # many, requests wait at the proxy, and then are refused.
        "max_ongoing_requests": 2 * slots,
        "max_queued_requests": settings.max_queue,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": settings.shutdown_timeout,
        "request_router_config": {"request_router_class": ROUTER},
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int((launch.device or "").startswith("cuda"))},
    }
    if launch.offline:
        ours["ray_actor_options"]["runtime_env"] = {"env_vars": {"HF_HUB_OFFLINE": "1"}}
    if "num_replicas" in own:
        del ours["autoscaling_config"]
    mappings = {key: {**ours[key], **own[key]} for key in own if isinstance(own[key], Mapping) and key in ours}
    return {**ours, **own, **mappings}


def middlewares() -> list[Middleware]:
    """What Serve's proxies put around each request."""
    return [Middleware(Proxied)]


class Replica:
    """The server of `medusa serve`, without its HTTP."""

    def __init__(self, launch: Launch, settings: ServerSettings):
        from medusa.serving.server import launched

        self._service = launched(launch, settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from ray import serve

        from medusa.serving.app import create_app

        served, name = create_app(self._service), serve.get_replica_context().replica_id.unique_id

        async def named(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_named(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    headers["X-Replica"] = name
                    del headers["X-Request-Id"]  # the proxy, from which we have it, sends it too
                await send(message)

            await served(scope, receive, send_named)

        return named

    def check_health(self) -> None:
        """Serve replaces a replica in which this raises."""
        if not self._service.engine.alive():
            raise RuntimeError("the engine has ended or is stuck")

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.engine.close(drain=False, timeout=10.0)
