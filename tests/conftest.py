"""Fixtures shared by the tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # each its share of the cores, the processes it starts too
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch
from transformers.utils import logging

from medusa import MedusaModel
from tiny import random_heads, random_tree, tiny_backbone

logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_model() -> MedusaModel:
    """A tiny random Llama with random heads and a tree wide enough to be right often."""
    backbone = tiny_backbone()
    return MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=64))


@pytest.fixture(scope="session")
def embedded_model() -> MedusaModel:
    """The embedded model in float32, where exactness is promised."""
    from medusa import EMBEDDED

    return MedusaModel.from_pretrained(EMBEDDED, dtype=torch.float32)


@pytest.fixture(scope="session")
def embedded_tokenizer():
    from transformers import AutoTokenizer

    from medusa import EMBEDDED

    return AutoTokenizer.from_pretrained(EMBEDDED)
