"""Options of the server: what it loads, where it listens, who may call it, and how much it takes on; and files of options."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from medusa.config import Quantization, check_options, from_mapping, option
from medusa.errors import ConfigError, InvalidInput

MOST_SLOTS = 16  # if memory decides


@dataclass(frozen=True)
class Launch:
    """The options of `medusa serve` that concern the model and its engine; its --help describes them."""

    model: str = "smollm2"
    heads: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    offline: bool = False  # has to be set before the hub's client is imported, by the command or by Ray
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    device: str | None = None
    trust_remote_code: bool = False
    tree: str | None = None
    quantization: Quantization = "none"
    tp: int = 1
    slots: int | None = None
    capacity: int | None = None
    compile: bool = False


@dataclass(frozen=True)
class ServerSettings:
    """The options of `medusa serve` that do not concern the model."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
    port: int = option(8000, "Port to listen on; 0 for any free one.", least=0, most=65535)
    uds: str | None = option(None, "Unix domain socket to listen on instead.")
    root_path: str = option("", "Path under which a proxy serves this server.")
    ssl_certfile: str | None = option(None, "Certificate file, for HTTPS.")
    ssl_keyfile: str | None = option(None, "Key file of the certificate.")
    served_model_name: str | None = option(None, "The model's name as clients see it (default: the name given here).")
    api_key: tuple[str, ...] = option((), "Key that clients must send, as a bearer token; repeatable (also: MEDUSA_API_KEY).")
    allowed_origins: tuple[str, ...] = option((), "Web origin whose pages may call the server; repeatable (default: none).")
    max_queue: int = option(256, "Number of requests that may wait for a slot; further ones are answered with 503.", least=1)
    max_per_client: int = option(
        0,
        "Number of answers that one client (identified by its key, or else by its address) may have running or waiting; "
        "further ones are answered with 429; 0: no limit.",
        least=0,
    )
    max_answers: int = option(64, "Number of answers that one call may ask for.", least=1)
    max_body: int = option(8 << 20, "Maximum number of bytes in a request's body.", least=1024)
    request_timeout: float = option(0.0, "Seconds after which a request ends with the tokens it has so far; 0: never.", least=0)
    shutdown_timeout: float = option(30.0, "Seconds allowed for running requests to finish after SIGTERM.", least=0)
    measure_trees: bool = option(True, "Choose trees by the measured time of steps, not only by the tree file.")
    keep_alive: float = option(15.0, "Seconds without an event after which a comment is sent to keep a stream open.", least=0.1)
    open_metrics: bool = option(False, "Serve /metrics without a key.")

    def __post_init__(self) -> None:
        check_options(self, "the server")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise InvalidInput("HTTPS needs a certificate and its key; pass both --ssl-certfile and --ssl-keyfile")
        for key in self.api_key:
            if not (key and key.isascii() and key.isprintable() and " " not in key):
                raise InvalidInput("an API key is empty or has characters that a header cannot carry; choose another")


NAMES = {kind: [field.name for field in fields(kind)] for kind in (Launch, ServerSettings)}
KNOWN = [name for names in NAMES.values() for name in names]
REPEATABLE = [field.name for field in fields(ServerSettings) if isinstance(field.default, tuple)]


def options_in(found: Any, source: str) -> dict[str, Any]:
    """The options in what a YAML file holds, by their names in Python.

    Args:
        source: where they are from, for errors.

    Raises:
        InvalidInput: something else is there.
        ConfigError: an option is unknown; the nearest known one is named.
    """
    if not isinstance(found, Mapping):
        raise InvalidInput(f"{source} holds a {type(found).__name__}, expected `option: value` lines")
    options = {str(key).replace("-", "_"): value for key, value in found.items()}
    for key in options.keys() - set(KNOWN):
        nearest = difflib.get_close_matches(key, KNOWN, n=1)
        raise ConfigError(f"{source}: unknown key {key!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
    for key in options.keys() & set(REPEATABLE):
        options[key] = options[key] if isinstance(options[key], list) else [options[key]]
    return options


def parted(options: Mapping[str, Any], source: str) -> tuple[Launch, ServerSettings]:
    """The options of `medusa serve` in their two parts; ConfigError if a value has the wrong type."""
    mine, theirs = ({name: options[name] for name in options if name in names} for names in NAMES.values())
    return from_mapping(Launch, mine, source), from_mapping(ServerSettings, theirs, source)
