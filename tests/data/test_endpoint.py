"""Claims about endpoints, against a server on this machine: patience, rate limits, and answers that are none."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medusa.errors import InvalidInput

pytest.importorskip("httpx")

from medusa.data.endpoint import Endpoint, EndpointError

HELLO = {
    "choices": [{"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


class Server:
    """A chat endpoint that answers with what `script` says: (status, headers, body) for each request, then HELLO."""

    def __init__(self, reply=None):
        self.script: list[tuple[int, dict[str, str], object]] = []
        self.requests: list[tuple[float, dict, dict]] = []
        self.under_way = self.most_under_way = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.requests.append((time.monotonic(), body, dict(self.headers)))
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                    status, headers, answer = outer.script.pop(0) if outer.script else (200, {}, None)
                if answer is None and status == 200:
                    answer = reply(body) if reply else HELLO
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                with lock:  # before the answer goes out, upon which the next request may come at once
                    outer.under_way -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    found = Server()
    yield found
    found.close()


ASKED = [{"role": "user", "content": "Hi"}]


def test_an_answer_is_read_and_the_request_is_what_was_asked(server):
    answer = Endpoint(server.url, "m", api_key="secret").chat(ASKED, temperature=0.3, max_tokens=5)
    assert (answer.text, answer.finished, answer.prompt_tokens, answer.completion_tokens) == ("Hello", True, 3, 1)
    _, body, headers = server.requests[0]
    assert body == {"model": "m", "messages": ASKED, "temperature": 0.3, "max_tokens": 5}
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer secret"


def test_passing_failures_are_tried_again_with_growing_pauses(server):
    server.script = [(500, {}, "oops"), (503, {}, "busy"), (429, {}, "slow down")]
    pauses = []
    assert Endpoint(server.url, "m", sleep=pauses.append).chat(ASKED).text == "Hello"
    assert len(server.requests) == 4 and len(pauses) == 3
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2 <= pauses[2] <= 4


def test_where_the_server_says_how_long_every_thread_waits(server):
    server.script = [(429, {"Retry-After": "0.4"}, "slow down")]
    endpoint = Endpoint(server.url, "m")
    first = threading.Thread(target=endpoint.chat, args=(ASKED,))
    first.start()
    while not endpoint._addresses[0].resume_at:
        time.sleep(0.005)
    endpoint.chat(ASKED)
    first.join()
    refused, *later = (at for at, *_ in server.requests)
    assert len(later) == 2 and all(at - refused >= 0.39 for at in later)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {}, {"error": "bad key"}), "refuses the request with status 401: .*bad key"),
        ((404, {}, {"error": "no model m"}), "refuses the request with status 404"),
        ((200, {}, b"<html>"), "something other than a chat completion: '<html>'"),
        ((200, {}, {"choices": []}), "something other than a chat completion"),
        ((200, {}, {"choices": [{"message": {"content": None}}]}), "answers without text"),
    ],
)
def test_what_is_no_answer_is_an_error_at_once(server, reply, message):
    server.script = [reply]
    with pytest.raises(EndpointError, match=message):
        Endpoint(server.url, "m").chat(ASKED)
    assert len(server.requests) == 1


def test_what_is_stopped_does_not_wait_for_the_next_try(server):
    server.script = [(503, {"Retry-After": "30"}, "come back later")]
    outcomes = []

    def work(task):
        for _ in range(3 if task == "waits" else 0):  # turns of a conversation, each asked whatever came of the last
            try:
                endpoint.chat(ASKED)
            except EndpointError as error:
                outcomes.append(str(error))
        while not endpoint._addresses[0].resume_at:
            time.sleep(0.005)
        return task

    endpoint = Endpoint(server.url, "m")
    found = endpoint.concurrently(work, ["waits", "answers"], 2)
    assert next(found) == "answers"
    found.close()  # as Ctrl-C does
    assert endpoint._addresses[0].resume_at > time.monotonic(), "it waited to the end"
    assert len(outcomes) == 3 and all("stopped before" in outcome for outcome in outcomes) and len(server.requests) == 1
    endpoint._addresses[0].resume_at = 0.0
    assert list(endpoint.concurrently(lambda task: endpoint.chat(ASKED).text, ["one", "two"], 2)) == ["Hello"] * 2


def test_a_server_that_stays_away_is_given_up_on():
    closed = Server()
    closed.close()
    with pytest.raises(EndpointError, match="does not answer after 2 tries"):
        Endpoint(closed.url, "m", tries=2, sleep=lambda _: None).chat(ASKED)
    with pytest.raises(InvalidInput, match="expected an address"):
        Endpoint("localhost:8000", "m")


def answered(server, content="Hello", tokens=None, **choice):
    usage = None if tokens is None else {"prompt_tokens": 1, "completion_tokens": tokens}
    server.script = [(200, {}, {"choices": [{"message": {"content": content}, **choice}], "usage": usage})]
    return Endpoint(server.url, "m").chat(ASKED, max_tokens=8)


@pytest.mark.parametrize(
    ("finished", "reasons"),
    [
        (
            True,
            ["stop", "eos_token", "eos", "end_turn", "stop_sequence", "STOP", "COMPLETE"],
        ),  # OpenAI, TGI, Together, Anthropic, …
        (False, ["length", "max_tokens", "MAX_TOKENS", "model_length"]),
        (None, ["content_filter", "tool_calls", "abort", "error", "SAFETY", "something new", 7]),
    ],
)
def test_endings_are_known_by_what_endpoints_really_say(server, finished, reasons):
    assert {reason: answered(server, finish_reason=reason).finished for reason in reasons} == dict.fromkeys(reasons, finished)


def test_ending_that_is_not_said_is_told_by_the_tokens(server):
    assert [answered(server, tokens=tokens, finish_reason=None).finished for tokens in (3, 8, None)] == [True, False, None]


def test_answer_is_checked_for_what_a_seed_is(server):
    with pytest.raises(EndpointError, match="not valid Unicode"):
        answered(server, "Hello \ud83d", finish_reason="stop")


def test_key_that_no_header_takes_is_refused_without_being_shown():
    with pytest.raises(InvalidInput, match="the endpoint's key contains characters that are not allowed in keys") as refused:
        Endpoint("http://localhost:1/v1", "m", api_key="schlüssel\n")
    assert "schl" not in str(refused.value)
