"""Endpoints: chat models behind an OpenAI-compatible HTTP interface, asked politely."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from medusa.errors import InvalidInput, MedusaError
from medusa.runs.files import is_unicode

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that another try may mend
# How endpoints say, in small letters, that an answer ended by itself, and that it reached the limit of tokens. What is neither
# (a filter, a call of a tool, an error, something new) is no answer to go on from.
BY_ITSELF = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "complete", "completed", "finished")
AT_THE_LIMIT = ("length", "max_tokens", "max_length", "max_output_tokens", "max_new_tokens", "model_length", "token_limit")
LONGEST_WAIT = 60.0  # seconds between tries, unless the server asks for more

Task = TypeVar("Task")
Result = TypeVar("Result")


class EndpointError(MedusaError):
    """An endpoint that does not answer, or refuses the request."""


class EndpointRefused(EndpointError):
    """An endpoint that would refuse any request: the key, the address or the model is wrong."""


@dataclass(frozen=True)
class Answer:
    """What an endpoint said."""

    text: str
    finished: bool | None  # by itself; False: at the limit of tokens; None: neither, `ended_by` says how
    prompt_tokens: int
    completion_tokens: int
    ended_by: str | None = None  # in the endpoint's own words


@dataclass
class Endpoint:
    """One model behind one URL; threads may share it.

    Args:
        url: base address, such as http://localhost:8000/v1.
        model: the name the server knows it by.
        api_key: sent as a bearer token.
        tries: how often a request is made before it counts as failed.
        timeout: seconds for one request.
        sleep: waits so many seconds between tries; None: no longer than until `concurrently` is stopped.
    """

    url: str
    model: str
    api_key: str | None = None
    tries: int = 6
    timeout: float = 120.0
    sleep: Callable[[float], object] | None = None
    _client: Any = field(default=None, init=False)
    _resume_at: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _here: threading.local = field(default_factory=threading.local, init=False)  # of a thread: what stops it

    def __post_init__(self) -> None:
        try:
            import httpx
        except ImportError:
            raise InvalidInput("endpoints need httpx: pip install 'medusa-decoding[endpoint]'") from None
        if not self.url.startswith(("http://", "https://")):
            raise InvalidInput(f"endpoint is {self.url!r}, wanted an address such as http://localhost:8000/v1")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InvalidInput("the endpoint's key holds characters that no key has; copy it again")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None)  # the caller bounds its threads
        self._client = httpx.Client(headers=headers, timeout=self.timeout, limits=limits)

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> Answer:
        """The model's answer to a conversation.

        A passing failure is tried again after a pause that doubles, with some chance in it; where the server says how long
        to wait (Retry-After), every thread waits.

        Args:
            options: `max_tokens`, `temperature`, `top_p`, `seed`, …, as the interface names them.

        Raises:
            EndpointError: refused, still failing at the last try, or stopped.
        """
        import httpx

        request = {"model": self.model, "messages": list(messages), **options}
        reason = ""
        for attempt in range(1, self.tries + 1):
            self._wait_for_leave()
            asked = None
            try:
                response = self._client.post(f"{self.url.rstrip('/')}/chat/completions", json=request)
            except httpx.InvalidURL as error:
                raise EndpointRefused(f"{self.url} is no address: {error}") from None
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

    def _wait_for_leave(self) -> None:
        while (left := self._resume_at - time.monotonic()) > 0 and not self._stopped.is_set():
            self._sleep(left)
        if self._stopped.is_set():
            raise EndpointError(f"stopped before {self.url} was asked")

    @property
    def _stopped(self) -> threading.Event:
        if not hasattr(self._here, "stopped"):
            self._here.stopped = threading.Event()
        return self._here.stopped

    def _sleep(self, seconds: float) -> None:
        (self.sleep or self._stopped.wait)(seconds)

    def concurrently(self, work: Callable[[Task], Result], tasks: Iterable[Task], at_once: int) -> Iterator[Result]:
        """What the work, which asks this endpoint, gives for every task, as it comes, with a bounded number under way.

        Stopped from outside or by an error, it waits for the answers under way and asks nothing more.
        """
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
        raise EndpointError(f"{url} answers with something else than a chat completion: {response.text[:100]!r}") from None
    if not isinstance(text, str):
        raise EndpointError(f"{url} answers without text")
    if not is_unicode(text):
        raise EndpointError(f"{url} answers with text that is no valid Unicode")
    said = None if ended_by is None else str(ended_by)
    return Answer(text, _finished(said, tokens[1], max_tokens), *tokens, ended_by=said)


def _finished(ended_by: str | None, tokens: int, max_tokens: int | None) -> bool | None:
    """Whether an answer ended by itself; None where that cannot be told."""
    if ended_by is None:  # some never say
        return tokens < max_tokens if tokens and max_tokens else None
    word = ended_by.lower()
    return True if word in BY_ITSELF else False if word in AT_THE_LIMIT else None


def _retry_after(response: Any) -> float | None:
    """Seconds the server asks to wait; a date instead of a number is passed over."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
