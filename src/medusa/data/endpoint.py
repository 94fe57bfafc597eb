"""Endpoints: a chat model behind an OpenAI-compatible HTTP interface, at one address or at several.

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
from medusa.runs.console import note
from medusa.runs.extras import require
from medusa.runs.files import is_unicode

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that another try may cure
# Endpoints' terms, in lower case, for an answer that ended by itself and for one that reached the limit of tokens. Answers that
# ended in another way (a filter, a tool call, an error, something new) cannot be used.
BY_ITSELF = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "complete", "completed", "finished")
AT_THE_LIMIT = ("length", "max_tokens", "max_length", "max_output_tokens", "max_new_tokens", "model_length", "token_limit")
LONGEST_WAIT = 60.0  # maximum number of seconds between tries, unless the server asks for more
CONNECT_WAIT = 10.0  # maximum number of seconds until a connection stands

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
class _Address:
    """One of the addresses of an endpoint, and how it fares."""

    url: str  # such as http://localhost:8000/v1
    under_way: int = 0  # number of requests
    resume_at: float = 0.0  # no request may be made before this time, as the server asked
    failures: int = 0  # number of failed connections since the last answer
    avoid_until: float = 0.0  # requests go to the others until this time, after a failed connection

    def pauses(self) -> bool:
        return time.monotonic() < max(self.resume_at, self.avoid_until)

    def avoid(self) -> None:
        self.failures += 1
        self.avoid_until = time.monotonic() + min(LONGEST_WAIT, 2.0**self.failures / 2)


@dataclass
class Endpoint:
    """One model behind one address or several, which share its requests; threads may share it.

    A request goes to the address with the fewest requests under way. If it fails there, it goes to the next at once. After a
    failed connection an address is avoided for a time that doubles, and then tried by one request.
    """

    url: str | Sequence[str]  # base address or addresses, such as http://localhost:8000/v1
    model: str  # the server's name for the model
    api_key: str | None = None  # sent as a bearer token
    tries: int = 6  # number of tries, each at all addresses that can be reached, before a request counts as failed
    timeout: float = 120.0  # seconds allowed for one request
    sleep: Callable[[float], object] | None = None  # waits between tries; None: until `concurrently` is stopped at the latest
    _client: Any = field(default=None, init=False)
    _addresses: list[_Address] = field(default_factory=list, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _here: threading.local = field(default_factory=threading.local, init=False)  # per thread: the event that stops it

    def __post_init__(self) -> None:
        httpx = require("httpx", "endpoint", "an endpoint")
        urls = [self.url] if isinstance(self.url, str) else list(dict.fromkeys(self.url))
        for url in urls or [""]:
            if not url.startswith(("http://", "https://")):
                raise InvalidInput(f"endpoint is {url!r}, expected an address such as http://localhost:8000/v1")
        self._addresses = [_Address(url) for url in urls]
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InvalidInput("the endpoint's key contains characters that are not allowed in keys; copy it again")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None)  # the caller bounds its threads
        patience = httpx.Timeout(self.timeout, connect=min(self.timeout, CONNECT_WAIT))
        self._client = httpx.Client(headers=headers, timeout=patience, limits=limits)

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> Answer:
        """The model's answer to a conversation.

        A temporary failure is tried again, at the other addresses at once, then after a pause that doubles, with jitter; if a
        server says how long to wait (Retry-After), no thread asks it before.

        Args:
            options: `max_tokens`, `temperature`, `top_p`, `seed` and others of the interface.

        Raises:
            EndpointError: the request is refused, still fails at the last try, or is stopped.
        """
        request = {"model": self.model, "messages": list(messages), **options}
        for attempt in range(1, self.tries + 1):
            failed: list[_Address] = []
            while not failed or any(not each.pauses() for each in self._addresses if each not in failed):
                outcome = self._ask(address := self._choose(failed), request)
                if isinstance(outcome, Answer):
                    return outcome
                failed.append(address)
            if attempt < self.tries:
                self._sleep(min(LONGEST_WAIT, 2.0**attempt / 2) * random.uniform(0.5, 1.0))
        raise EndpointError(f"{address.url} does not answer after {self.tries} tries ({outcome})")

    def _choose(self, failed: Sequence[_Address]) -> _Address:
        """The address to ask next; its `under_way` counts the request already."""
        with self._lock:
            chosen = min(self._addresses, key=lambda each: (each.pauses(), each in failed, each.under_way))
            if chosen.failures and not chosen.pauses():  # this request finds out whether it is back, the others wait for that
                chosen.avoid()
            chosen.under_way += 1
        return chosen

    def _ask(self, address: _Address, request: dict[str, Any]) -> Answer | str:
        """The answer of an address, or why it has none for now."""
        import httpx

        try:
            self._wait_until_allowed(address)
            response = self._client.post(f"{address.url.rstrip('/')}/chat/completions", json=request)
        except httpx.InvalidURL as error:
            raise EndpointRefused(f"{address.url} is not an address: {error}") from None
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            self._note_failure(address, reason)
            return reason
        finally:
            with self._lock:
                address.under_way -= 1
        with self._lock:
            address.failures, address.avoid_until = 0, 0.0
            if response.status_code in PASSING and (asked := _retry_after(response)) is not None:
                address.resume_at = max(address.resume_at, time.monotonic() + asked)
        if response.is_success:
            return _read(response, address.url, request.get("max_tokens"))
        reason = f"status {response.status_code}"
        if response.status_code in PASSING:
            return reason
        said = " ".join(response.text.split())[:200]
        kind = EndpointRefused if response.status_code in (401, 403, 404) else EndpointError
        raise kind(f"{address.url} refuses the request with {reason}: {said}")

    def _note_failure(self, address: _Address, reason: str) -> None:
        """Have the other requests avoid an address for a while."""
        with self._lock:
            if first := not address.failures:  # later ones are counted by `_choose`, and those that fail together once
                address.avoid()
        if first and len(self._addresses) > 1:
            note(f"{address.url} does not answer ({reason}); its requests go to the other addresses until it does")

    def _wait_until_allowed(self, address: _Address) -> None:
        while (left := address.resume_at - time.monotonic()) > 0 and not self._stopped.is_set():
            self._sleep(left)
        if self._stopped.is_set():
            raise EndpointError(f"stopped before the request to {address.url}")

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
