"""Claims about `medusa convert` and `medusa inspect`: what they print, what is published, errors in one line."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from medusa import EMBEDDED
from medusa.checkpoints.writer import save_heads
from medusa.cli.inspect import inspect_command
from tiny import random_heads, tiny_backbone


def in_a_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", "medusa", *arguments], capture_output=True, text=True, timeout=240, env=env)


def test_convert_and_inspect(medusa, tmp_path, capsys):
    out = tmp_path / "out"
    done = medusa("convert", "embedded", str(out), "--to", "vllm", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "output": str(out), "format": "vllm", "num_heads": 5, "num_layers": 1, "base_model": str(EMBEDDED),
    }  # fmt: skip
    inspect_command(str(out), as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["heads"]["format"] == "vllm" and record["heads"]["file"] == "model.safetensors"
    assert record["heads"]["num_heads"] == 5 and record["heads"]["dtype"] == "bfloat16" and record["tree"]["nodes"] > 1
    (out / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))
    inspect_command(str(out / "model.safetensors"))
    assert "says 2 heads" in capsys.readouterr().out


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download of a folder and a commit take; what comes is kept."""

    protocol_version = "HTTP/1.1"
    served: Path
    asked: list[str] = []
    received: dict[str, bytes] = {}
    created: list[dict] = []

    def answer(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        reply: dict | list = {}
        headers = {"content-type": "application/json"}
        data = None
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            reply = {"url": f"http://{self.headers['host']}/me/heads"}
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            reply = {"files": [{**file, "shouldIgnore": False} for file in files]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            reply = {"commitOid": "0" * 40, "commitUrl": f"http://{self.headers['host']}/me/heads/commit/0"}
        elif "/resolve/" in self.path:
            name = self.path.rpartition("/")[2]
            self.asked.append(name)
            data = (self.served / name).read_bytes()
            headers = {"etag": f'"{name}"', "x-repo-commit": "0" * 40}
        elif "/tree/" in self.path:
            sizes = {path.name: path.stat().st_size for path in self.served.iterdir()}
            reply = [{"type": "file", "path": name, "size": size, "oid": "1" * 40} for name, size in sizes.items()]
        elif self.path.startswith("/api/models/me/"):
            reply = {
                "id": "me/heads",
                "sha": "0" * 40,
                "siblings": [{"rfilename": path.name} for path in self.served.iterdir()],
            }
        data = json.dumps(reply).encode() if data is None else data
        self.send_response(200)
        for name, value in {**headers, "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Hub.received, Hub.created, Hub.asked = {}, [], []
    address = f"http://127.0.0.1:{server.server_port}"
    yield {"HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_id_of_a_whole_model_in_pickles_is_read(tmp_path, hub):
    backbone = tiny_backbone()
    heads = {f"medusa_head.{name}": tensor for name, tensor in random_heads(backbone).state_dict().items()}
    Hub.served = tmp_path / "served"
    Hub.served.mkdir()
    (Hub.served / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (Hub.served / "optimizer.bin").write_bytes(b"x")
    torch.save({**backbone.state_dict(), **heads}, Hub.served / "pytorch_model.bin")
    done = in_a_process("inspect", "me/heads", "--json", **hub)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["heads"]["format"] == "merged" and json.loads(done.stdout)["heads"]["num_heads"] == 3
    assert set(Hub.asked) == {"config.json", "pytorch_model.bin"}


def test_push_to_hub_publishes_the_folder_with_a_card(tmp_path, hub):
    backbone = tiny_backbone()
    save_heads(random_heads(backbone), tmp_path / "heads", base_model="me/backbone")
    (tmp_path / "heads" / "run.json").write_text("{}")
    out = tmp_path / "out"
    done = in_a_process(
        "convert", str(tmp_path / "heads"), str(out), "--to", "medusa", "--push-to-hub", "me/heads", "--private", **hub
    )
    assert done.returncode == 0, done.stderr
    private = [{"visibility": "private"}, {"private": True}]  # as newer and older clients of the hub say it
    assert Hub.created in [[{"name": "heads", "organization": "me", **said}] for said in private]
    assert Hub.received.keys() == {"config.json", "medusa_lm_head.safetensors", "README.md"}
    assert all(content == (out / name).read_bytes() for name, content in Hub.received.items())
    card = Hub.received["README.md"].decode()
    assert "base_model: me/backbone" in card and "3 heads, 1 residual block each, with their own LM heads" in card
    assert "from_pretrained('me/backbone', heads=\"this folder\")" in card
    assert f"{hub['HF_ENDPOINT']}/me/heads" in done.stdout


def test_hub_that_is_not_there_is_one_line(tmp_path):
    done = in_a_process(
        "convert", "embedded", str(tmp_path / "out"), "--to", "medusa", "--push-to-hub", "me/heads",
        HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_x",
    )  # fmt: skip
    assert done.returncode == 1 and "cannot publish" in done.stderr.splitlines()[-1], done.stderr
