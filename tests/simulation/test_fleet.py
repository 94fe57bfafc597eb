"""Claims about a fleet: its closed form is what a replica does step by step; limits and loads are met, and only just."""

from dataclasses import replace

import pytest

from medusa.errors import InvalidInput
from medusa.simulation.fleet import MEMORY_SHARE, Replica
from medusa.simulation.hardware import load_hardware
from medusa.simulation.prediction import CANDIDATES, Setting, log_law
from medusa.simulation.shapes import BUILT_IN

H100 = load_hardware("h100-sxm")
SMALL = Setting(BUILT_IN["llama-3-8b"], H100, own_lm_heads=False)
LARGE = replace(SMALL, shape=BUILT_IN["llama-3-70b"], gpus=8)


def replica(setting=SMALL, sizes=CANDIDATES, prompt=1024, answer=256, rate=log_law):
    return Replica(setting, prompt, answer, rate, sizes)


def test_the_closed_form_is_the_throughput_of_steps_between_which_prompts_are_read():
    of = replica(sizes=(16,), answer=64, rate=lambda size: 2.0)
    left = [2 * (n + 1) for n in range(32)]  # tokens that the 32 requests still generate: one of them ends with every step
    seconds, tokens = 0.0, 0
    for _ in range(320):
        seconds += SMALL.seconds(32, 1024 + 32, 16)
        tokens += 2 * len(left)
        left = [n - 2 for n in left]
        seconds += left.count(0) * SMALL.prefill_seconds(1024)
        left = [n or 64 for n in left]
    assert of.operating(32).tokens_per_second == pytest.approx(tokens / seconds)


@pytest.mark.parametrize("setting", [SMALL, LARGE])
@pytest.mark.parametrize("sizes", [(1,), CANDIDATES])
def test_limits_and_loads_are_met_and_only_just(setting, sizes):
    of = replica(setting, sizes)
    for limit in (0.05, 0.08):
        found = of.within(limit)
        assert found.seconds_per_token <= limit < of.operating(found.requests + 1).seconds_per_token
    for load in (100, 1500):
        found = of.under(load)
        assert found.tokens_per_second >= load
        assert found.requests == 1 or of.operating(found.requests - 1).tokens_per_second < load
        assert found.requests == pytest.approx(found.tokens_per_second * found.seconds_per_token)  # Little's law
    assert of.within(1e-4) is None and of.under(1e9) is None
    assert of.within(1e3).requests == of.most_requests


def test_trees_serve_no_fewer_than_plain_decoding_and_switch_off_in_large_batches():
    plain, medusa = replica(sizes=(1,)), replica()
    pairs = [(plain.operating(n), medusa.operating(n)) for n in (1, 4, 16, 64, 256)]
    assert all(b.seconds_per_token <= a.seconds_per_token for a, b in pairs)
    nodes = [b.candidates for _, b in pairs]
    assert nodes == sorted(nodes, reverse=True) and nodes[0] > 32 and nodes[-1] == 1
    assert pairs[0][1].cost(3.0, 1) < pairs[0][0].cost(3.0, 1)
    assert pairs[0][0].cost(3.0, 8) == pytest.approx(1e6 * 24 / 3600 * pairs[0][0].seconds_per_token)


@pytest.mark.parametrize("setting", [SMALL, LARGE, replace(SMALL, own_lm_heads=True)])
def test_as_many_requests_as_fit_beside_weights_and_heads(setting):
    of, room = replica(setting), MEMORY_SHARE * setting.gpus * H100.memory - setting.heads_memory
    assert setting.memory(of.most_requests, 1280) <= room < setting.memory(of.most_requests + 1, 1280)
    assert replica(setting, sizes=(1,)).most_requests > of.most_requests
    with pytest.raises(InvalidInput, match="leave no memory for a request"):
        replica(replace(LARGE, gpus=1)).within(1)


def test_gpus_share_the_work_and_pay_for_their_exchange():
    at_once = replace(H100, launch=0.0, link=1e30)
    one, eight = (Setting(BUILT_IN["llama-3-70b"], at_once, num_heads=0, gpus=gpus) for gpus in (1, 8))
    rows_moved = 8 * eight.seconds(1, 1024, 16) / one.seconds(1, 1024, 16)
    assert 1 < rows_moved < 1.02  # every GPU reads the rows that enter a layer
    real = replace(eight, hardware=replace(H100, launch=0.0))
    sums, logits = 2 * 80 * 2 * 16 * 8192 * 2, 16 * 128256 * 2
    assert real.seconds(1, 1024, 16) - eight.seconds(1, 1024, 16) == pytest.approx((sums + logits) * 7 / 8 / 450e9)
    assert real.prefill_seconds(16) - eight.prefill_seconds(16) == pytest.approx((sums + logits / 16) * 7 / 8 / 450e9)


def test_gpus_that_cannot_share_are_refused():
    with pytest.raises(InvalidInput, match="no link between GPUs is known"):
        Setting(BUILT_IN["llama-7b"], load_hardware("rtx-4090"), gpus=2)
    with pytest.raises(InvalidInput, match="32 heads and 8 of keys cannot be shared evenly by 3 GPUs"):
        replace(SMALL, gpus=3)
