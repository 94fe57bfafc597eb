"""Settings of the server: where it listens, who may call it, and how much it takes on."""

from __future__ import annotations

from dataclasses import dataclass

from medusa.config import check_options, option
from medusa.errors import InvalidInput


@dataclass(frozen=True)
class ServerSettings:
    """The options of `medusa serve` that do not concern the model."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
    port: int = option(8000, "Port to listen on; 0 for any free one.", least=0, most=65535)
    uds: str | None = option(None, "Unix domain socket to listen on instead.")
    root_path: str = option("", "Path under which a proxy serves this server.")
    ssl_certfile: str | None = option(None, "Certificate file, for HTTPS.")
    ssl_keyfile: str | None = option(None, "Key file of the certificate.")
    served_model_name: str | None = option(None, "The model's name for clients (default: its name here).")
    api_key: tuple[str, ...] = option((), "Key that clients must send, as a bearer token; repeatable (also: MEDUSA_API_KEY).")
    allowed_origins: tuple[str, ...] = option((), "Web origin whose pages may call the server; repeatable (default: none).")
    max_queue: int = option(256, "Number of requests that may wait for a slot; more are answered with 503.", least=1)
    max_per_client: int = option(
        0,
        "Number of answers that a client (its key, or else its address) may have running or waiting; more are answered with "
        "429; 0: no limit.",
        least=0,
    )
    max_answers: int = option(64, "Number of answers that one call may ask for.", least=1)
    max_body: int = option(8 << 20, "Bytes of a request's body.", least=1024)
    request_timeout: float = option(0.0, "Seconds after which a request ends with what it has; 0: never.", least=0)
    shutdown_timeout: float = option(30.0, "Seconds that running requests have to finish after SIGTERM.", least=0)
    measure_trees: bool = option(True, "Use the tree that is fastest by the measured time of steps, not only the tree file.")
    keep_alive: float = option(15.0, "Seconds of silence after which a stream gets a comment that keeps it open.", least=0.1)
    open_metrics: bool = option(False, "Serve /metrics without a key.")

    def __post_init__(self) -> None:
        check_options(self, "the server")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise InvalidInput("HTTPS needs a certificate and its key; pass both --ssl-certfile and --ssl-keyfile")
        for key in self.api_key:
            if not (key and key.isascii() and key.isprintable() and " " not in key):
                raise InvalidInput("an API key is empty or has characters that a header cannot carry; choose another")
