"""Claims about distillation on many machines: work is shared; what dies hands its rows over; none is lost or made twice."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import medusa
from data.test_endpoint import ASKED, HELLO, Server
from medusa import EMBEDDED, MedusaModel
from medusa.checkpoints.writer import save_heads
from medusa.config import TREE_FILE
from medusa.data.endpoint import Endpoint, EndpointError
from medusa.data.samples import Skips
from medusa.training.answerers import EndpointAnswerer, ModelAnswerer
from medusa.training.distillation import Distillation, Shards, answer_seeds, read_seeds
from medusa.trees.files import save_tree
from tiny import tiny_backbone

pytest.importorskip("httpx")


def records(folder) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    """A tiny chat model on disk, and prompts for it."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from serving.running import byte_model, byte_tokenizer

    model = byte_model()
    model.backbone.save_pretrained(tmp_path / "model")
    save_heads(model.heads, tmp_path / "heads", None)
    save_tree(model.tree, tmp_path / "heads" / TREE_FILE)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    turns = [[f"What is {n} + {n}?", "And twice that?"] for n in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    return tmp_path


@contextmanager
def servers(folder, number: int):
    """As many processes of `medusa serve`, with their addresses."""
    command = [sys.executable, "-m", "medusa", "serve", str(folder / "model"), "--heads", str(folder / "heads"), "--port", "0"]
    command += ["--served-model-name", "m", "--slots", "2", "--capacity", "512", "--dtype", "float32", "--no-measure-trees"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
            for _ in range(number)
        ]
        for process in started:
            stack.callback(process.kill)
        found = []
        for process in started:
            said: list[str] = []
            while not (said and (url := re.search(r"served at (http://[\d.:]+/v1)", said[-1]))):
                said.append(process.stderr.readline())
                assert said[-1], f"it ended before it listened: {said}"
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            found.append((process, url[1]))
        yield found


def test_a_server_that_is_killed_hands_its_rows_to_the_other_and_none_is_lost_or_made_twice(folder, capfd):
    how = {"temperature": 0.0, "max_new_tokens": 24, "batch_size": 8}
    output = folder / "out"
    with servers(folder, 2) as ((victim, first), (_, second)):

        def kill():
            while not (output / "samples-00000.jsonl").exists() or len(records(output)) < 5:
                time.sleep(0.005)
            victim.send_signal(signal.SIGKILL)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        done = medusa.distill("m", folder / "prompts.jsonl", output, endpoint=[first, second], **how)
        thread.join(10)
    assert victim.returncode == -signal.SIGKILL, "killed too late"
    assert done.made == 24 and not done.failed
    assert f"{first} does not answer" in capfd.readouterr().err, "it had no request under way"
    made = records(output)
    assert len(made) == 24
    assert medusa.distill("m", folder / "prompts.jsonl", output, endpoint="http://localhost:1/v1", **how).already == 24
    model, options = MedusaModel.from_pretrained(folder / "model", heads=folder / "heads"), Distillation(**how)
    from serving.running import byte_tokenizer

    seeds = read_seeds(folder / "prompts.jsonl", Skips())
    answer_seeds(seeds, ModelAnswerer(model, byte_tokenizer(), options), Shards(folder / "here"))
    assert {each["id"]: each for each in made} == {each["id"]: each for each in records(folder / "here")}


def reply_after(seconds):
    def reply(_):
        time.sleep(seconds)
        return HELLO

    return reply


def test_requests_go_to_the_address_with_the_fewest_under_way(tmp_path):
    quick, slow = Server(reply_after(0.01)), Server(reply_after(0.2))
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(40)))
    try:
        endpoint = Endpoint([quick.url, slow.url, quick.url], "m")  # the same address twice is one
        seeds = read_seeds(tmp_path / "prompts.txt", Skips())
        done = answer_seeds(seeds, EndpointAnswerer(endpoint, Distillation(batch_size=4)), Shards(tmp_path / "out"))
    finally:
        quick.close()
        slow.close()
    assert done.made == 40 == len(quick.requests) + len(slow.requests)
    assert len(quick.requests) > len(slow.requests) > 0
    assert quick.most_under_way <= 3 and slow.most_under_way <= 2, "four at a time, of which no address has all"


def test_what_one_address_refuses_for_now_another_answers_at_once():
    busy, free = Server(), Server()
    busy.script = [(429, {"Retry-After": "60"}, "slow down"), (500, {}, "oops")]
    pauses = []
    try:
        endpoint = Endpoint([busy.url, free.url], "m", sleep=pauses.append)
        assert [endpoint.chat(ASKED).text for _ in range(4)] == ["Hello"] * 4
    finally:
        busy.close()
        free.close()
    assert not pauses and len(busy.requests) == 1 and len(free.requests) == 4


def test_an_address_that_is_back_gets_requests_again():
    server, gone = Server(), Server()
    gone.close()
    endpoint = Endpoint([gone.url, server.url], "m")
    try:
        for _ in range(3):
            endpoint.chat(ASKED)
        away, other = endpoint._addresses
        assert away.failures == 1 and len(server.requests) == 3, "it was asked more than once"
        away.url, away.avoid_until = server.url, 0.0  # as if it had come back, and its time had passed
        other.under_way = 1
        endpoint.chat(ASKED)
        assert away.failures == 0 and not away.pauses()
    finally:
        server.close()
    with pytest.raises(EndpointError, match="does not answer after 3 tries"):
        Endpoint([gone.url, server.url], "m", tries=3, sleep=lambda _: None).chat(ASKED)


def descendants(process: int) -> dict[int, bytes]:
    """The command lines of a process, its children, their children and so on."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found = [process]
    for each in found:
        found += children.get(each, [])
    commands = {}
    for each in found:
        with suppress(OSError):
            commands[each] = Path(f"/proc/{each}/cmdline").read_bytes()
    return commands


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker in /proc")
def test_ray_hands_the_rows_of_a_killed_worker_to_another_and_writes_the_shards_of_one_process(tmp_path):
    pytest.importorskip("ray")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tiny_backbone(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [json.dumps({"text": f"import os\nx = {n}\n"}) + "\n" for n in range(48)]
    (tmp_path / "seeds.jsonl").write_text("".join(texts))
    how = {"max_new_tokens": 32, "batch_size": 2, "temperature": 0.0}
    command = [sys.executable, "-m", "medusa", "distill", str(tmp_path / "model"), "--data", str(tmp_path / "seeds.jsonl")]
    command += ["--output", str(tmp_path / "ray"), "--ray", "1", "--json"]
    command += [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None and not (tmp_path / "ray" / "samples-00000.jsonl").exists():
            time.sleep(0.005)
        (worker,) = (each for each, name in descendants(process.pid).items() if name.startswith(b"ray::MapWorker"))
        os.kill(worker, signal.SIGKILL)
        shown, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-2000:]
    assert "worker died" in errors, "killed too late"
    assert json.loads(shown)["made"] == 48
    medusa.distill(str(tmp_path / "model"), tmp_path / "seeds.jsonl", tmp_path / "here", **how)
    made, here = records(tmp_path / "ray"), records(tmp_path / "here")
    assert len(made) == 48 and {each["id"]: each for each in made} == {each["id"]: each for each in here}
