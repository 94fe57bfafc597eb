"""Endpoints: chat models behind an OpenAI-compatible HTTP interface.

The `openai` SDK is not used: its sleep between tries cannot be interrupted, and a server's Retry-After pauses only one request
there, but every thread here.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from medusa.errors import InvalidInput, MedusaError
from medusa.runs.extras import require
from medusa.runs.files import is_unicode

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that another try may cure
# Endpoints' terms, in lower case, for an answer that ended by itself and for one that reached the limit of tokens. Answers that
# ended in another way (a filter, a tool call, an error, something new) cannot be used.
BY_ITSELF = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "complete", "completed", "finished")
AT_THE_LIMIT = ("length", "max_tokens", "max_length", "max_output_tokens", "max_new_tokens", "model_length", "token_limit")
LONGEST_WAIT = 60.0  # maximum number of seconds between tries, unless the server asks for more

Task = TypeVar("Task")
Result = TypeVar("Result")


class EndpointError(MedusaError):
    """An endpoint does not answer, or refuses the request."""


class EndpointRefused(EndpointError):
    """An endpoint would refuse any request: the key, the address or the model is wrong."""


@dataclass(frozen=True)
class Answer:
    """An endpoint's answer."""

    text: str
    finished: bool | None  # True: ended by itself; False: at the limit of tokens; None: in another way, see `ended_by`
    prompt_tokens: int
    completion_tokens: int
    ended_by: str | None = None  # the endpoint's own term


@dataclass
class Endpoint:
    """One model behind one URL; threads may share it."""

    url: str  # base address, such as http://localhost:8000/v1
    model: str  # the server's name for the model
    api_key: str | None = None  # sent as a bearer token
    tries: int = 6  # number of tries before a request counts as failed
    timeout: float = 120.0  # seconds allowed for one request
    sleep: Callable[[float], object] | None = None  # waits between tries; None: until `concurrently` is stopped at the latest
    _client: Any = field(default=None, init=False)
    _resume_at: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _here: threading.local = field(default_factory=threading.local, init=False)  # per thread: the event that stops it

    def __post_init__(self) -> None:
        httpx = require("httpx", "endpoint", "an endpoint")
        if not self.url.startswith(("http://", "https://")):
            raise InvalidInput(f"endpoint is {self.url!r}, expected an address such as http://localhost:8000/v1")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InvalidInput("the endpoint's key contains characters that are not allowed in keys; copy it again")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None)  # the caller bounds its threads
        self._client = httpx.Client(headers=headers, timeout=self.timeout, limits=limits)

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> Answer:
        """The model's answer to a conversation.

        A temporary failure is tried again after a pause that doubles, with jitter; if the server says how long to wait
        (Retry-After), every thread waits.

        Args:
            options: `max_tokens`, `temperature`, `top_p`, `seed` and others of the interface.

        Raises:
            EndpointError: the request is refused, still fails at the last try, or is stopped.
        """
        import httpx

        request = {"model": self.model, "messages": list(messages), **options}
        reason = ""
        for attempt in range(1, self.tries + 1):
            self._wait_until_allowed()
            asked = None
            try:
                response = self._client.post(f"{self.url.rstrip('/')}/chat/completions", json=request)
            except httpx.InvalidURL as error:
                raise EndpointRefused(f"{self.url} is not an address: {error}") from None
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            else:
                if response.is_success:
                    return _read(response, self.url, options.get("max_tokens"))
                reason = f"status {response.status_code}"
                if response.status_code not in PASSING:
                    said = " ".join(response.text.split())[:200]
                    kind = EndpointRefused if response.status_code in (401, 403, 404) else EndpointError
                    raise kind(f"{self.url} refuses the request with {reason}: {said}")
                asked = _retry_after(response)
            if attempt < self.tries:
                pause = min(LONGEST_WAIT, 2.0**attempt / 2) * random.uniform(0.5, 1.0)
                if asked is not None:
                    with self._lock:
                        self._resume_at = max(self._resume_at, time.monotonic() + asked)
                self._sleep(pause)
        raise EndpointError(f"{self.url} does not answer after {self.tries} tries ({reason})")

    def _wait_until_allowed(self) -> None:
        while (left := self._resume_at - time.monotonic()) > 0 and not self._stopped.is_set():
            self._sleep(left)
        if self._stopped.is_set():
            raise EndpointError(f"stopped before the request to {self.url}")

    @property
    def _stopped(self) -> threading.Event:
        if not hasattr(self._here, "stopped"):
            self._here.stopped = threading.Event()
        return self._here.stopped

    def _sleep(self, seconds: float) -> None:
        (self.sleep or self._stopped.wait)(seconds)

    def concurrently(self, work: Callable[[Task], Result], tasks: Iterable[Task], at_once: int) -> Iterator[Result]:
        """The results of work with requests to this endpoint, in the order in which the tasks finish; at most `at_once` run at
        a time. If stopped from outside or by an error, it waits for the running requests and makes no more."""
        waiting: set[Future] = set()
        stopped = threading.Event()

        def run(task: Task) -> Result:
            self._here.stopped = stopped
            return work(task)

        with ThreadPoolExecutor(at_once) as pool:
            try:
                for task in tasks:
                    waiting.add(pool.submit(run, task))
                    if len(waiting) >= at_once:
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in done)
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _read(response: Any, url: str, max_tokens: int | None) -> Answer:
    try:
        output = response.json()
        choice, usage = output["choices"][0], output.get("usage") or {}
        text, ended_by = choice["message"]["content"], choice.get("finish_reason")
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise EndpointError(f"{url} answers with something other than a chat completion: {response.text[:100]!r}") from None
    if not isinstance(text, str):
        raise EndpointError(f"{url} answers without text")
    if not is_unicode(text):
        raise EndpointError(f"{url} answers with text that is not valid Unicode")
    said = None if ended_by is None else str(ended_by)
    return Answer(text, _finished(said, tokens[1], max_tokens), *tokens, ended_by=said)


def _finished(ended_by: str | None, tokens: int, max_tokens: int | None) -> bool | None:
    """Whether an answer ended by itself; None if unknown."""
    if ended_by is None:  # some endpoints never say
        return tokens < max_tokens if tokens and max_tokens else None
    word = ended_by.lower()
    return True if word in BY_ITSELF else False if word in AT_THE_LIMIT else None


def _retry_after(response: Any) -> float | None:
    """Seconds that the server asks to wait; a date instead of a number is ignored."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
