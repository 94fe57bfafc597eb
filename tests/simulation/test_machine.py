"""Claims about measuring: what is measured is complete and usable, and operators really run."""

import pytest
import torch

from medusa.errors import InvalidInput
from medusa.simulation.hardware import load_hardware
from medusa.simulation.machine import ROWS, _real, measure_machine, validate
from medusa.simulation.operators import attention, linear
from medusa.simulation.prediction import Setting
from medusa.simulation.shapes import ModelShape

GROUPED = ModelShape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocabulary=128)


@pytest.fixture(scope="module")
def here():
    return measure_machine("cpu", "float32", megabytes=2, widths=(32, 128), rounds=1)


def test_a_measured_machine_predicts_steps_from_what_was_measured(here):
    assert [sample[:2] for sample in here.linear["float32"]] == [[width, rows] for width in (32, 128) for rows in ROWS]
    assert min(here.bandwidth, here.pointwise, here.launch, here.memory, here.flops("float32")) > 0
    setting = Setting(GROUPED, here, "float32")
    linear_time = sum(o.count * here.seconds(o, "float32") for o in setting.operators(1, 32, 8) if o.weights)
    assert setting.seconds(1, 32, 8) >= linear_time + here.step + 2 * here.layer


def test_validation_runs_every_operator_of_every_phase(here):
    found = validate(Setting(GROUPED, here, "float32"), "cpu", batch=2, length=16, candidates=[1, 4], megabytes=1, rounds=1)
    layer = {"q", "k", "v", "qk", "pv", "o", "up", "gate", "down"}
    ran = {phase: {v.operator for v in found if v.phase == phase} for phase in ("prefill", "decoding", "medusa")}
    assert ran == {
        "prefill": layer,
        "decoding": layer | {"lm_head"},
        "medusa": layer | {"lm_head", "head blocks", "head logits"},
    }
    assert all(v.measured > 0 and v.error == pytest.approx(v.predicted / v.measured - 1) for v in found)


@pytest.mark.parametrize(
    "operator", [linear("up", 6, 8, 12), attention("qk", 2, 10, 3, 4, 2, 8), attention("pv", 2, 10, 3, 4, 2, 8)]
)
def test_the_operator_that_runs_does_the_arithmetic_that_is_counted(operator):
    from torch.utils.flop_counter import FlopCounterMode

    run, runs = _real(operator, torch.float32, "cpu", megabytes=1)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == runs * operator.flops


def test_what_cannot_be_run_is_refused():
    a100 = load_hardware("a100-80gb-pcie")
    with pytest.raises(InvalidInput, match="without quantised weights"):
        validate(Setting(GROUPED, a100, weight_bits=4), "cpu", 1, 8, [1])
    with pytest.raises(InvalidInput, match="rounds is 0"):
        measure_machine("cpu", rounds=0)
