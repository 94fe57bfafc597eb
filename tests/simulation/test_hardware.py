"""Claims about hardware: known machines, files of measured ones, and the time of an operator."""

import json
from dataclasses import replace

import pytest

from medusa.errors import CheckpointError, ConfigError, InvalidInput
from medusa.simulation.hardware import Hardware, known_hardware, load_hardware, save_hardware
from medusa.simulation.operators import Operator, attention, linear

SAMPLES = [[100, 1, 8e-10], [100, 16, 32e-10], [1000, 1, 2e-10], [1000, 4, 4e-10], [1000, 16, 16e-10]]
MEASURED = Hardware(
    peak={"bfloat16": 1e12}, bandwidth=1e10, memory=1e9, source="a test", compute_share=1, bandwidth_share=1, launch=1e-6,
    layer=1e-4, step=1e-3, pointwise=2e10, linear={"bfloat16": SAMPLES}, asynchronous=False,
)  # fmt: skip


def test_the_machines_of_the_issue_are_known_with_their_sources():
    known = known_hardware()
    assert {"a100-80gb-pcie", "a40", "a6000", "h100-sxm", "h200", "rtx-4090", "apple-m2-ultra"} <= set(known)
    assert all(hardware.source and hardware.flops("bfloat16") > hardware.bandwidth for hardware in known.values())


def test_time_is_launch_then_memory_then_arithmetic():
    hardware = load_hardware("a100-80gb-pcie")
    operator = attention("qk", 4, 1000, 8, 8, 2, 64)
    moving, computing = operator.bytes / (0.96 * 1935e9), operator.flops / (0.89 * 312e12)
    assert hardware.seconds(operator) == pytest.approx(34e-6 + moving + computing)


def test_measured_linear_layers_go_through_the_samples_and_keep_their_rate_beyond():
    def a_weight(rows, width=1000):
        return (MEASURED.seconds(linear("up", rows, width, 500)) - 1e-6) / (width * 500)

    assert [a_weight(rows) for rows in (1, 4, 16)] == pytest.approx([2e-10, 4e-10, 16e-10])
    assert a_weight(2) == pytest.approx((2e-10 * 4e-10) ** 0.5)  # halfway on logarithmic axes
    assert a_weight(64) == pytest.approx(4 * 16e-10)
    assert a_weight(1, 50) == a_weight(1, 100) == pytest.approx(8e-10) and a_weight(1, 4000) == pytest.approx(2e-10)
    assert a_weight(16, 316) == pytest.approx((16e-10 * 32e-10) ** 0.5, rel=0.01)  # halfway between the widths
    assert MEASURED.seconds(Operator("pointwise", 0, 4e10)) == pytest.approx(2)
    assert load_hardware("a40").seconds(Operator("pointwise", 0, 4e10)) == 0


def test_quantised_weights_save_a_measured_machine_the_reading_and_no_more():
    full, eighth = (MEASURED.seconds(linear("up", 1, 1000, 1000, weight=weight)) for weight in (2, 0.25))
    assert full - eighth == pytest.approx(1.75e6 / 1e10)
    tiny = MEASURED.seconds(linear("up", 1, 1000, 1000, weight=0.001))
    assert tiny >= 1e-6 + 0.001e6 / 1e10


def test_a_measured_machine_survives_its_file(tmp_path):
    file = tmp_path / "new" / "machines.json"
    save_hardware(MEASURED, "one", file)
    assert load_hardware(str(file)) == MEASURED
    save_hardware(replace(MEASURED, bandwidth=2e10, pointwise=None), "two", file)
    assert load_hardware(f"{file}:two").bandwidth == 2e10 and load_hardware(f"{file}:one") == MEASURED
    with pytest.raises(InvalidInput, match="holds one, two; name one as"):
        load_hardware(str(file))


def test_unknown_machines_dtypes_and_fields_are_named(tmp_path):
    with pytest.raises(InvalidInput, match="no hardware 'a1000'; known: a100-80gb-pcie"):
        load_hardware("a1000")
    with pytest.raises(InvalidInput, match="no FLOP/s known for float16; this hardware has bfloat16"):
        MEASURED.flops("float16")
    file = tmp_path / "machines.json"
    entry = {"peak": {"bfloat16": 1e12}, "bandwidth": 1e10, "memory": 1e9, "source": "a test"}
    for broken, error, words in (
        ({**entry, "bandwith": 1}, ConfigError, "did you mean 'bandwidth'"),
        ({**entry, "bandwidth": 0}, InvalidInput, "numbers above 0"),
        ({**entry, "peak": {"bfloat16": "fast"}}, InvalidInput, "numbers above 0"),
        ({**entry, "peak": {}}, InvalidInput, "peak"),
        ({**entry, "linear": {"bfloat16": [[1, 2e-10]]}}, InvalidInput, "need samples"),
        (7, CheckpointError, "is 7, expected an object"),
    ):
        file.write_text(json.dumps({"here": broken}))
        with pytest.raises(error, match=words):
            load_hardware(str(file))
