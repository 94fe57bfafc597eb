"""Claims about the server under Ray Serve that need no cluster; integration/ray/run.sh has those that do."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import httpx
import yaml

from medusa.errors import InvalidInput, MedusaError
from medusa.serving import ray as ours
from medusa.serving.proxy import Proxied
from medusa.serving.settings import Launch, ServerSettings, options_in, parted

SETTINGS = ServerSettings(max_queue=7, shutdown_timeout=90.0)


@pytest.fixture
def serve(monkeypatch):
    """Ray Serve."""
    monkeypatch.setenv(ours.CALLBACK, "")
    return pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)


def answered(messages, path="/v1/completions"):
    """What a client gets when a proxy sends these messages and then ends."""

    async def proxy(scope, receive, send):
        for message in messages:
            await send(message)

    async def asked():
        transport = httpx.ASGITransport(Proxied(proxy))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.get(path)

    return asyncio.run(asked())


def start(status, kind, **headers):
    named = {"content-type": kind, **headers}
    return {"type": "http.response.start", "status": status, "headers": [[k.encode(), v.encode()] for k, v in named.items()]}


def body(text, more=False):
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def test_a_stream_whose_replica_ends_tells_so():
    found = answered([start(200, "text/event-stream; charset=utf-8"), body("data: {}\n\n", more=True)])
    first, error, done = found.text.strip().split("\n\n")
    assert (first, done) == ("data: {}", "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_an_answer_that_had_not_begun_may_be_asked_for_again():
    found = answered([])
    assert found.status_code == 503 and found.headers["retry-after"] == "1"
    assert found.json()["error"]["type"] == "overloaded_error" and found.json()["error"]["code"] == "replica_lost"


@pytest.mark.parametrize(
    ("status", "code"), [(503, "overloaded"), (408, "timeout"), (404, "not_found"), (500, "internal_error")]
)
def test_errors_of_the_proxy_have_openais_shape(status, code):
    found = answered([start(status, "text/plain; charset=utf-8"), body("Request dropped due to backpressure")])
    assert found.status_code == status and found.json()["error"]["code"] == code
    assert found.headers.get("retry-after") == ("1" if status == 503 else None)
    assert answered([start(503, "text/plain", **{"retry-after": "9"}), body("later")]).headers["retry-after"] == "9"


def test_whatever_a_replica_answers_stays_as_it_is():
    stream = [start(200, "text/event-stream"), body("data: 1\n\n", more=True), body("data: [DONE]\n\n")]
    assert answered(stream).text == "data: 1\n\ndata: [DONE]\n\n"
    assert answered([start(400, "application/json"), body('{"error": 1}')]).json() == {"error": 1}
    assert answered([start(200, "text/plain"), body("metrics")]).text == "metrics"
    assert answered([start(503, "text/plain"), body("draining")], "/-/healthz").text == "draining"


def test_a_proxy_does_not_load_torch():
    code = "import sys; from medusa.serving.ray import middlewares; middlewares(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_replicas_are_scaled_queued_and_drained_by_the_servers_options():
    found = ours.deployment(Launch(slots=8), SETTINGS, {})
    assert found["autoscaling_config"]["target_ongoing_requests"] == 8 and found["max_ongoing_requests"] == 16
    assert found["max_queued_requests"] == 7 and found["graceful_shutdown_timeout_s"] == 90
    assert found["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}
    own = {"autoscaling_config": {"max_replicas": 4}, "max_ongoing_requests": 20, "ray_actor_options": {"num_cpus": 3}}
    found = ours.deployment(Launch(slots=8, device="cuda", offline=True), SETTINGS, own)
    assert found["autoscaling_config"] == {"target_ongoing_requests": 8, "max_replicas": 4}
    assert found["max_ongoing_requests"] == 20 and found["ray_actor_options"].items() >= {"num_cpus": 3, "num_gpus": 1}.items()
    assert found["ray_actor_options"]["runtime_env"] == {"env_vars": {"HF_HUB_OFFLINE": "1"}}
    fixed = ours.deployment(Launch(), SETTINGS, {"num_replicas": 2})
    assert fixed["num_replicas"] == 2 and "autoscaling_config" not in fixed


def test_a_missing_ray_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidInput, match=r"pip install 'medusa-decoding\[ray\]'"):
        ours.app({})


def test_options_come_from_arguments_over_a_file(serve, tmp_path, capsys):
    (tmp_path / "serve.yaml").write_text("slots: 2\nmax-queue: 5\nhost: 0.0.0.0\napi_key: secret\n")
    given = {"model": "embedded", "slots": "3", "config": str(tmp_path / "serve.yaml"), "deployment": "{num_replicas: 2}"}
    deployed = ours.app(given)._bound_deployment
    launch, settings = deployed.init_args
    assert (launch.model, launch.slots, settings.max_queue, settings.api_key) == ("embedded", 3, 5, ("secret",))
    assert (deployed.num_replicas, deployed.max_ongoing_requests) == (2, 6)
    assert "host: not followed" in capsys.readouterr().err


def test_the_manifests_have_options_that_the_server_knows():
    folder = Path(__file__).parents[2] / "examples/kubernetes"
    config, *rest = yaml.safe_load_all((folder / "deployment.yaml").read_text())
    _, settings = parted(options_in(yaml.safe_load(config["data"]["serve.yaml"]), "deployment.yaml"), "deployment.yaml")
    spec = rest[0]["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] > settings.shutdown_timeout + 5
    service = yaml.safe_load((folder / "rayservice.yaml").read_text())
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    own = application["args"].pop("deployment")
    launch, settings = parted(options_in(application["args"], "rayservice.yaml"), "rayservice.yaml")
    chosen = ours.deployment(launch, settings, own)
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["maxReplicas"] >= chosen["autoscaling_config"]["max_replicas"]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > chosen["graceful_shutdown_timeout_s"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slot": 3}, "unknown key 'slot'; did you mean 'slots'?"),
        ({"model": "a: b: c"}, "are not YAML"),
        ({"slots": "three"}, "slots is 'three'"),
        ({"max_queue": 0}, "expected at least 1"),
        ({"deployment": "two"}, "expected a mapping"),
        ({"deployment": {"num_replica": 2}}, "deployment: .*num_replica"),
        ({"deployment": {"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}}, "deployment: "),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(serve, options, said):
    with pytest.raises(MedusaError, match=said):
        ours.app(options)
