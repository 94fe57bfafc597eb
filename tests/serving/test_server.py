"""Claims about being a server: keys, origins, sizes, clients that go away, full queues, the end."""

import json
import socket
import threading
import time

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from medusa.errors import InvalidInput
from medusa.serving.server import check_address
from medusa.serving.settings import ServerSettings
from running import SPECIAL, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
LONG = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
SHORT = {**LONG, "max_tokens": 2}


def test_a_key_guards_everything_but_the_probes(model, tokenizer):
    with serve(model, tokenizer, api_key=("right", "other")) as served:
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
            response = served.get(path)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        for path in (CHAT, "/tokenize"):
            assert served.post(path, SHORT).status_code == 401
        for wrong in ("Bearer wrong", "Bearer", "right", "Basic right", "Bearer righ", "Bearer right1", "Bearer é"):
            assert served.get("/v1/models", headers={"authorization": wrong.encode()}).status_code == 401
        for right in ("Bearer right", "bearer other"):
            assert served.get("/v1/models", headers={"authorization": right}).status_code == 200
        assert served.get("/health").status_code == served.get("/ready").status_code == 200


def test_probes_are_open_behind_a_proxy_too(model, tokenizer):
    with serve(model, tokenizer, api_key=("right",), root_path="/llm") as served:
        assert served.get("/health").status_code == 200 and served.get("/v1/models").status_code == 401


def test_metrics_may_be_open(model, tokenizer):
    with serve(model, tokenizer, api_key=("right",), open_metrics=True) as served:
        assert served.get("/metrics").status_code == 200 and served.get("/version").status_code == 401


def test_no_origin_is_allowed_unless_named(served, model, tokenizer):
    headers = {"origin": "http://page.test", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(served.url + CHAT, headers=headers).headers
    with serve(model, tokenizer, allowed_origins=("http://page.test",)) as open_one:
        answer = httpx.options(open_one.url + CHAT, headers=headers)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://page.test"
        refused = httpx.options(open_one.url + CHAT, headers={**headers, "origin": "http://other.test"})
        assert "access-control-allow-origin" not in refused.headers


def test_large_bodies_are_refused_whatever_their_header_says(model, tokenizer):
    with serve(model, tokenizer, max_body=2048) as served:
        large = json.dumps({**SHORT, "user": "x" * 4000}).encode()
        for content in (large, iter([large[:3000], large[3000:]])):  # with a length, and in chunks
            headers = {"content-type": "application/json"}
            response = httpx.post(served.url + CHAT, content=content, headers=headers)
            assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        assert served.post(CHAT, SHORT).status_code == 200


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(served, monkeypatch):
    kind, lengths = type(served.service.tokenizer), []

    def counted(self, text, *args, call=kind.__call__, **options):
        lengths.append(len(text))
        return call(self, text, *args, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    giant = "word " * 1_000_000
    bodies = {TEXT: {"prompt": ["short", giant]}, CHAT: {"messages": [{"role": "user", "content": giant}]}}
    for path, body in bodies.items():
        response = served.post(path, {"model": "tiny", **body})
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert max(lengths) < 100
    longest = SPECIAL[2] * (served.service.longest - 1)  # tokens of the most characters
    answer = served.post(TEXT, {"model": "tiny", "prompt": longest, "max_tokens": 1})
    assert answer.status_code == 200 and lengths[-1] == len(longest) > 10_000


def test_requests_have_ids(served):
    answer = served.post(CHAT, SHORT, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1" and answer.json()["id"] == "chatcmpl-mine-1"
    made = [served.get("/version", headers=headers).headers["x-request-id"] for headers in ({}, {"x-request-id": "a b"})]
    assert len(set(made)) == 2 and all(len(each) == 32 for each in made)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(served, stream):
    before = served.metric("vllm:request_success_total", finished_reason="cancelled") or 0
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream(
            "POST", served.url + CHAT, json={**LONG, "n": 24, "stream": stream}, timeout=httpx.Timeout(5, read=0.5)
        ) as response,
    ):
        for _ in response.iter_lines():
            time.sleep(0.1)
            raise httpx.ReadTimeout("enough")
    assert served.idle(10)
    until = time.monotonic() + 10
    while (served.metric("vllm:request_success_total", finished_reason="cancelled") or 0) == before:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_full_queue_says_when_to_come_back(model, tokenizer):
    with serve(model, tokenizer, engine={"slots": 1, "queue": 2}) as served:
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(served.post(CHAT, LONG))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 503} and statuses.count(200) >= 3
        for refused in (answer for answer in answers if answer.status_code == 503):
            assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "overloaded"
        assert served.metric("vllm:admission_rejections_total", engine="0") == statuses.count(503)
        assert served.idle() and served.post(CHAT, SHORT).status_code == 200


def test_a_client_that_has_its_share_waits_and_others_do_not(model, tokenizer):
    mine, other = ({"authorization": f"Bearer {key}"} for key in ("mine", "other"))
    with serve(model, tokenizer, api_key=("mine", "other"), max_per_client=3, engine={"slots": 4}) as served:
        events: list[dict] = []
        running = threading.Thread(target=lambda: events.extend(streamed(served, {**LONG, "n": 2, "max_tokens": 900}, mine)))
        running.start()
        while served.service.held["key 0"] < 2:
            time.sleep(0.01)
        refused = served.post(CHAT, {**SHORT, "n": 2}, headers=mine)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert served.metric("medusa:share_rejections_total", engine="0") == 1
        assert served.post(CHAT, {**SHORT, "n": 2}, headers=other).status_code == 200
        assert served.post(CHAT, SHORT, headers=mine).status_code == 200  # the third
        assert served.post(CHAT, {**SHORT, "n": 4}, headers=mine).status_code == 400  # never possible
        running.join()
        assert served.post(CHAT, {**SHORT, "n": 3}, headers=mine).status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(served.url + CHAT, json={**LONG, "n": 3}, headers=mine, timeout=httpx.Timeout(5, read=0.05))
        until = time.monotonic() + 20
        while served.service.held:  # a client that has gone holds nothing
            assert time.monotonic() < until
            time.sleep(0.02)


def streamed(served, body, headers) -> list[dict]:
    with httpx.stream("POST", served.url + CHAT, json={**body, "stream": True}, headers=headers, timeout=300) as response:
        return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


def test_answers_to_a_call_are_all_queued_or_none(model, tokenizer):
    with serve(model, tokenizer, engine={"slots": 1, "queue": 3}) as served:
        assert served.post(CHAT, {**LONG, "n": 30}).status_code == 503
        assert served.idle(10) and served.post(CHAT, {**SHORT, "n": 2}).status_code == 200


def test_time_is_up_ends_with_what_there_is(model, tokenizer):
    with serve(model, tokenizer, request_timeout=0.3) as served:
        choice = served.post(CHAT, LONG).json()["choices"][0]
        assert choice["finish_reason"] == "abort"
        events = served.stream(CHAT, LONG)
        assert events[-1]["choices"][0]["finish_reason"] == "abort"
        assert served.idle(5) and served.metric("vllm:request_success_total", finished_reason="abort") == 2


def test_idle_connections_are_kept_for_longer_than_by_clients_and_proxies(served):
    assert served.server.config.timeout_keep_alive > 60


def test_a_silent_stream_is_kept_open(model, tokenizer):
    with serve(model, tokenizer, engine={"slots": 1}, keep_alive=0.1) as served:
        blocker = threading.Thread(target=served.post, args=(CHAT, LONG))
        blocker.start()
        time.sleep(0.05)
        with httpx.stream("POST", served.url + CHAT, json={**SHORT, "stream": True}, timeout=300) as response:
            lines = [line for line in response.iter_lines() if line]
        blocker.join()
        assert ": keep-alive" in lines and lines[-1] == "data: [DONE]"


def test_the_first_signal_drains(model, tokenizer):
    with serve(model, tokenizer) as served:
        events: list[dict] = []
        running = threading.Thread(target=lambda: events.extend(served.stream(CHAT, LONG)))
        client = httpx.Client()  # its connection is open before
        client.get(served.url + "/ready")
        running.start()
        while not served.service.engine.load().running:
            time.sleep(0.01)
        served.server.handle_exit(15, None)
        assert client.get(served.url + "/ready").status_code == 503
        refused = client.post(served.url + CHAT, json=SHORT)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        running.join(60)
        assert events[-1]["choices"][0]["finish_reason"] == "length"  # it was finished, not cut
        until = time.monotonic() + 20
        while not served.server.should_exit:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_what_is_not_finished_in_time_is_told_so(model, tokenizer):
    with serve(model, tokenizer, shutdown_timeout=0.1) as served:
        answers: list[httpx.Response] = []
        running = threading.Thread(target=lambda: answers.append(served.post(CHAT, {**LONG, "n": 8})))
        running.start()
        while not served.service.engine.load().running:
            time.sleep(0.01)
        served.server.handle_exit(15, None)
        running.join(30)
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "shutting_down"


def test_the_log_has_a_line_for_each_request_and_no_text_of_it(served, caplog):
    with caplog.at_level("INFO", logger="medusa.serve"):
        secret = [{"role": "user", "content": "the secret word"}]
        served.post(CHAT, {**SHORT, "messages": secret, "unknown_field_of_this_test": 1}, headers={"x-request-id": "logged"})
        served.post(CHAT, {**SHORT, "messages": secret, "unknown_field_of_this_test": 1})
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if line.startswith("logged ") and "output=2" in line]) == 1
    assert len([line for line in lines if "unknown_field_of_this_test" in line]) == 1
    assert "secret" not in "\n".join(lines)


def test_metrics_count_as_vllm_does(model, tokenizer):
    with serve(model, tokenizer) as served:
        answer = served.post(CHAT, {**LONG, "max_tokens": 50}).json()
        page = served.get("/metrics").text
        assert "vllm:num_requests_running" in page and "medusa:tree_nodes" in page
        assert served.metric("vllm:generation_tokens_total", engine="0") == 50
        assert served.metric("vllm:prompt_tokens_total", engine="0") == answer["usage"]["prompt_tokens"]
        assert served.metric("vllm:request_success_total", finished_reason="length") == 1
        accepted = answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
        assert served.metric("vllm:spec_decode_num_accepted_tokens_total", engine="0") == accepted > 0
        steps = served.metric("medusa:tokens_per_step_count", engine="0")
        assert steps == 50 - accepted
        for name in ("e2e_request_latency", "request_queue_time", "request_inference_time", "time_to_first_token"):
            assert served.metric(f"vllm:{name}_seconds_count", engine="0") == 1
        assert served.metric("vllm:inter_token_latency_seconds_count", engine="0") == steps - 1
        assert served.metric("medusa:request_tokens_per_step_sum", engine="0") == pytest.approx(50 / steps)


def test_tokenize_and_detokenize_are_inverse(served):
    text = "Words and é"
    found = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(text.encode()) and "".join(found["token_strs"][:5]) == "Words"
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = served.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    prompt = served.post("/detokenize", {"tokens": chat}).json()["prompt"]
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_traced_stream_shows_every_step_and_its_tree(served):
    events = served.stream(CHAT, {**LONG, "max_tokens": 30, "medusa": {"trace": "tree"}})
    steps = [event["medusa"] for event in events if "medusa" in event]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert "".join(piece for step in steps for piece in step["pieces"]) == text
    assert sum(len(step["tokens"]) for step in steps) == 30
    for step in steps:
        for node in step.get("nodes", ()):
            assert node.keys() == {"token", "text", "parent", "p", "accepted"} and 0 <= node["p"] <= 1
    assert any(step.get("nodes") for step in steps)
    assert all(event["choices"][0]["logprobs"] is None for event in events if event["choices"])
    asked = served.post(CHAT, {**LONG, "max_tokens": 30, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    traced = [logprob for step in steps for logprob in step["logprobs"]]
    assert traced == pytest.approx([each["logprob"] for each in asked], abs=1e-5) and len(traced) == 30
    assert not any("medusa" in event for event in served.stream(CHAT, {**LONG, "max_tokens": 5}))


def test_a_prompt_that_was_seen_before_is_found_in_the_cache(model, tokenizer):
    with serve(model, tokenizer, engine={"slots": 1}) as served:
        body = {**SHORT, "messages": [{"role": "user", "content": "A long story that is told twice. " * 3}]}
        first, again = (served.post(CHAT, body).json() for _ in range(2))
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert 50 < again["usage"]["prompt_tokens_details"]["cached_tokens"] < again["usage"]["prompt_tokens"]
        assert again["choices"][0]["message"] == first["choices"][0]["message"]
        assert served.metric("vllm:prefix_cache_hits_total", engine="0") > 50


def test_a_stream_that_fails_ends_with_the_error(model, tokenizer):
    with serve(model, tokenizer) as served, httpx.stream("POST", served.url + CHAT, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        while "content" not in next(lines):
            pass
        served.service.engine.close(drain=False)
        *_, failed, done = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(failed)["error"]["code"] == "shutting_down" and done == "[DONE]"
        assert served.get("/health").status_code == 503


def test_a_socket_of_this_machine(model, tokenizer, tmp_path):
    with serve(model, tokenizer, uds=str(tmp_path / "medusa.sock")) as served:
        assert served.url == f"unix:{tmp_path}/medusa.sock"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(tmp_path / "medusa.sock"))) as client:
            assert client.get("http://medusa/v1/models").json()["data"][0]["id"] == "tiny"


def test_an_address_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"cannot listen on 127.0.0.1:{port}: .*; choose another --port or --host"):
            check_address(ServerSettings(port=port))
    check_address(ServerSettings(port=0))
