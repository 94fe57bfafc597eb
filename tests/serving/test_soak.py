"""The claim of benchmarks/soak.py, for seconds: in a crowd that asks, leaves and sends nonsense, nothing is lost or mixed."""

import argparse
import asyncio
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from running import serve


def test_nothing_is_lost_or_mixed_in_a_crowd(model, tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import soak

    args = argparse.Namespace(clients=24, minutes=0.1, tokens=32, known=8)
    with serve(model, tokenizer, engine={"slots": 3, "queue": 4}) as served:
        seen, _ = asyncio.run(soak.soak(served.url, args, None))
        assert served.idle() and served.service.engine.load().running == 0
    assert seen.faults == []
    assert {"streamed", "whole", "left", "nonsense refused"} <= seen.outcomes.keys()
