"""Claims about tensor parallelism: two ranks, on a CPU, decode what one process decodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from distributed.decoding import decode
from medusa.backbone.ranks import check_shares
from medusa.checkpoints.writer import save_heads
from medusa.errors import UnsupportedBackbone
from tiny import random_heads, tiny_backbone

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """What one process and each of two ranks have decoded."""
    folder = tmp_path_factory.mktemp("ranks")
    backbone = tiny_backbone()
    backbone.save_pretrained(folder / "backbone")
    for kind in ("root", "path"):
        save_heads(random_heads(backbone, 3, shared=True, heads_kind=kind, embedding_scale=0.3), folder / kind)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launch, str(HERE / "decoding.py"), str(folder), "2"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return json.loads(json.dumps(decode(folder, 1))), *ranks


SETTINGS = ("greedy", "static", "sampled", "penalty", "typical", "two steps of a stream", "after that")


@pytest.mark.parametrize("setting", [*SETTINGS, "root", "path"])
def test_two_ranks_decode_what_one_process_decodes(decoded, setting):
    one, first, second = (found[setting] for found in decoded)
    assert first == second == one


def test_drafts_are_accepted_on_two_ranks(decoded):
    for setting in ("greedy", "sampled", "static"):
        lengths = [length for row in decoded[1][setting]["lengths"] for length in row]
        assert sum(lengths) / len(lengths) > 1.5, setting


def test_rank_0_draws_the_seed(decoded):
    one, first, second = (found["seed of rank 0"] for found in decoded)
    assert first == second == one  # rank 1 has seeded its generator differently


def test_a_failure_on_rank_0_ends_the_call_on_every_rank(decoded):
    _, first, second = (found["failing"] for found in decoded)
    assert "a criterion of the caller's" in first[1] and second[0]
    assert second[1].startswith("rank 0 failed") and "a criterion of the caller's" in second[1]


@pytest.mark.parametrize(("heads", "groups", "size", "said"), [(8, 6, 4, "6 key/value heads"), (6, 2, 3, "2 key/value heads")])
def test_heads_that_cannot_be_shared_out_are_refused(heads, groups, size, said):
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=groups, hidden_size=48)
    with pytest.raises(UnsupportedBackbone, match=f"{said} cannot be shared out among {size} ranks; choose 2"):
        check_shares(config, size)
    check_shares(config, 2)
