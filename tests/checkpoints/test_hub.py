"""Claims about the hub: one copy of the weights is fetched, what belongs to them, and code only where allowed."""

import hashlib
import http.server
import json
import threading

import pytest
from huggingface_hub import HfApi

from medusa.checkpoints import hub
from medusa.errors import CheckpointError

CODE = ["modeling_own.py", "parts/layers.py"]
BESIDE = ["config.json", "generation_config.json", "tokenizer.json", "qwen.tiktoken", "additional_chat_templates/rag.jinja"]
SHARDS = ["model-00001-of-00002.safetensors", "odd-name.safetensors"]
INDEX = json.dumps({"weight_map": {"a.weight": SHARDS[0], "b.weight": SHARDS[1]}})
OF_OTHERS = [  # copies of the weights, and what is for people
    *(
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "tf_model.h5",
        "flax_model.msgpack",
    ),
    *(
        "onnx/model.onnx",
        "onnx/config.json",
        "rust_model.ot",
        "model-q4.gguf",
        "pytorch_model.bin",
        "README.md",
        ".gitattributes",
    ),
]


class Repository(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download takes: one repository."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    fetched: list[str] = []

    def do_GET(self):
        path, status, body = self.path.partition("?")[0], 200, b""
        headers = {"content-type": "application/json", "x-repo-commit": "0" * 40}
        if "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            if name in self.files:
                body = self.files[name]
                headers["etag"] = f'"{hashlib.sha1(name.encode() + body).hexdigest()}"'
                if self.command == "GET":
                    Repository.fetched.append(name)
            else:
                status, headers["x-error-code"] = 404, "EntryNotFound"
        elif "/tree/" in path:
            sizes = [{"type": "file", "path": name, "size": len(body), "oid": "1"} for name, body in self.files.items()]
            body = json.dumps(sizes).encode()
        else:
            body = json.dumps(
                {"id": "me/model", "sha": "0" * 40, "siblings": [{"rfilename": name} for name in self.files]}
            ).encode()
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository's files, and a function that fetches it and says which of them came."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": tmp_path}
    listing, snapshot, single = HfApi(endpoint=where["endpoint"]), hub.snapshot_download, hub.hf_hub_download
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", lambda: listing)
    monkeypatch.setattr(hub, "snapshot_download", lambda *given, **options: snapshot(*given, **where, **options))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *given, **options: single(*given, **where, **options))

    def fetched(*names, **options):
        Repository.files = {name: INDEX.encode() if name.endswith("index.json") else b"{}" for name in names}
        Repository.fetched = []
        folder = hub.fetch("me/model", **options)
        assert all((folder / name).is_file() for name in Repository.fetched)
        return sorted(Repository.fetched)

    yield fetched
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (["model.safetensors", "model.safetensors.index.json", *SHARDS], ["model.safetensors", "model.safetensors.index.json"]),
        (["model.safetensors.index.json", *SHARDS], ["model.safetensors.index.json", *SHARDS]),
        ([], ["pytorch_model.bin"]),
        (["model.safetensors", "medusa_lm_head.safetensors", "medusa_lm_head.pt"],
         ["model.safetensors", "medusa_lm_head.safetensors"]),
        (["model.safetensors", "medusa_lm_head.pt", "adapter_model.safetensors", "adapter_model.bin"],
         ["model.safetensors", "medusa_lm_head.pt", "adapter_model.safetensors"]),
    ],
)  # fmt: skip
def test_one_copy_of_the_weights_is_fetched_and_what_belongs_to_it(repository, weights, wanted):
    assert repository(*weights, *BESIDE, *OF_OTHERS, *CODE) == sorted([*wanted, *BESIDE])


def test_code_is_fetched_where_it_may_run(repository):
    held = ["model.safetensors", *BESIDE, *CODE]
    assert not set(CODE) & set(repository(*held))
    assert set(CODE) <= set(repository(*held, code=True))


def test_what_was_fetched_once_is_found_without_the_hub(repository, monkeypatch):
    repository("model.safetensors", *BESIDE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (hub.fetch("me/model") / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="me/other is not a folder here and cannot be fetched from the hub") as refused:
        hub.fetch("me/other")
    assert "\n" not in str(refused.value)
