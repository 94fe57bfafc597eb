"""A tiny chat model behind the real server: the engine's thread, uvicorn on a port of this machine, and what calls it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from medusa import MedusaModel
from medusa.serving.calls import Service
from medusa.serving.engine import Engine
from medusa.serving.metrics import Metrics
from medusa.serving.pieces import _byte_level
from medusa.serving.server import Server, make_server
from medusa.serving.settings import ServerSettings
from tiny import random_heads, random_tree, tiny_backbone

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
VOCAB = 256 + len(SPECIAL)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte: texts of a random model are often not UTF-8."""
    vocabulary = dict(_byte_level())
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1], bos_token=SPECIAL[2])
    fast.chat_template = template
    return fast


def byte_model() -> MedusaModel:
    """A tiny random model of bytes that ends its texts now and then."""
    backbone = tiny_backbone(vocab_size=VOCAB, max_position_embeddings=1024, eos_token_id=257, bos_token_id=258)
    return MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=48, ranks=24))


@dataclass
class Served:
    """A running server."""

    url: str
    service: Service
    server: Server

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=300, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=300, **options)

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a streamed answer, which has to end with [DONE]."""
        with httpx.stream("POST", self.url + path, json={**body, "stream": True}, timeout=300) as response:
            assert response.status_code == 200, response.read()
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        return self.service.metrics.registry.get_sample_value(name, {"model_name": "tiny", **labels})

    def idle(self, seconds: float = 30) -> bool:
        """Wait until no request runs; returns whether that happened."""
        until = time.monotonic() + seconds
        while (load := self.service.engine.load()).running or load.waiting:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True


@contextmanager
def serve(model: MedusaModel, tokenizer: Any, engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[Served]:
    """A server for the time of a `with`."""
    made = Engine(model, **{"slots": 4, "capacity": 1088, **(engine or {})})
    service = Service(made, model, tokenizer, "tiny", ServerSettings(**{"port": 0, **settings}), Metrics("tiny", made))
    server = make_server(service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Served(server.address, service, server)
    finally:
        server.should_exit = True
        thread.join(20)
        made.close(drain=False, timeout=20)
