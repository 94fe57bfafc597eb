"""Claims about predicted speedup: the shapes of the paper's Figures 21 to 23, and its Table 1."""

import json
import math
from pathlib import Path

import pytest

from medusa import EMBEDDED, MedusaTree
from medusa.errors import CheckpointError, InvalidInput
from medusa.metrics import expected_acceptance_length
from medusa.simulation.hardware import load_hardware
from medusa.simulation.prediction import Setting, best, calibrated, log_law, predict, stops_paying
from medusa.simulation.shapes import BUILT_IN
from medusa.trees.calibration import Calibration

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
A100 = load_hardware("a100-80gb-pcie")
BLOCK = Setting(BUILT_IN["llama-7b"], A100, paper_block=True)
POWERS = [2**k for k in range(9)]


def test_at_batch_1_speedup_is_greatest_near_64_candidates():
    assert best(BLOCK, 1, 1024, log_law, POWERS).candidates == 64
    exact = best(BLOCK, 1, 1024, log_law, range(1, 257))
    assert 48 <= exact.candidates <= 96
    assert predict(BLOCK, 1, 1024, 64, log_law).speedup > 0.985 * exact.speedup


def test_speedup_falls_with_batch_and_no_tree_pays_much_beyond_32():
    speedups = [best(BLOCK, 2**k, 1024, log_law).speedup for k in range(7)]
    assert speedups == sorted(speedups, reverse=True) and speedups[-1] == 1  # the root alone
    assert 32 < stops_paying(BLOCK, 1024, log_law, range(1, 65)) < 48
    assert predict(BLOCK, 64, 1024, 16, log_law).speedup < 1


def test_at_batch_4_speedup_falls_with_length_and_the_best_size_hardly_moves():
    found = [best(BLOCK, 4, 2**k, log_law, range(1, 129)) for k in range(7, 14)]
    assert [p.speedup for p in found] == sorted((p.speedup for p in found), reverse=True)
    assert max(p.candidates for p in found) - min(p.candidates for p in found) <= 4


def test_predicted_overhead_is_near_what_table_1_measured():
    for name, measured in PAPER["table1"].items():
        for block in (True, False):
            point = predict(Setting(BUILT_IN[name], A100, paper_block=block), 1, 1024, 64, log_law)
            assert point.overhead == pytest.approx(measured["overhead"], rel=0.06)


def test_only_the_logarithm_of_base_2_agrees_with_the_paper():
    rates = {base: log_law(64, base) for base in (2, math.e, 10)}
    measured = [row["acceleration_rate"] for row in PAPER["table1"].values()]
    assert rates[10] == 1  # no gain at all
    assert min(measured) / rates[math.e] > 1.5
    assert 0.8 < rates[2] / min(measured) < 1
    stops = {base: stops_paying(BLOCK, 1024, lambda q, base=base: log_law(q, base), range(1, 65)) for base in rates}
    assert stops[10] == 1 and stops[math.e] < 16 and stops[2] > 32  # the paper: beyond 32


def test_a_point_adds_up():
    point = predict(BLOCK, 2, 512, 32, log_law)
    assert point.overhead == pytest.approx(BLOCK.seconds(2, 512, 32) / BLOCK.seconds(2, 512, 1))
    assert point.speedup == pytest.approx(point.acceleration_rate / point.overhead)
    assert predict(BLOCK, 2, 512, 1, log_law).speedup == 1


def test_quantised_weights_quicken_plain_steps_more_than_trees():
    full, quarter = Setting(BUILT_IN["llama-7b"], A100), Setting(BUILT_IN["llama-7b"], A100, weight_bits=4)
    assert quarter.seconds(1, 1024, 1) < full.seconds(1, 1024, 1)
    assert predict(quarter, 1, 1024, 64, log_law).overhead > predict(full, 1, 1024, 64, log_law).overhead


def test_heads_of_their_own_cost_more_than_shared_ones_and_none_cost_nothing():
    own, shared, none = (
        Setting(BUILT_IN["llama-7b"], A100, num_heads=heads, own_lm_heads=own)
        for heads, own in ((5, True), (5, False), (0, True))
    )
    assert own.seconds(1, 128, 16) > shared.seconds(1, 128, 16) > none.seconds(1, 128, 16)
    assert own.seconds(1, 128, 1) == none.seconds(1, 128, 1)  # plain decoding runs none


def test_a_calibration_gives_the_rate_of_the_best_tree_of_each_size():
    calibration = Calibration.load(EMBEDDED)
    rate = calibrated(calibration)
    rates = [rate(size) for size in (1, 2, 8, 32)]
    assert rates[0] == 1 and rates == sorted(rates) and rates[-1] > 2
    dense = MedusaTree.dense([3, 2])
    assert calibration.expected_acceptance_length(dense) <= rate(len(dense)) + 1e-9


def test_independent_heads_give_the_rate_that_metrics_expects(tmp_path):
    accuracies, positions = [[0.6, 0.2], [0.5, 0.1]], 1000
    paths = [[[i], 1000 * p] for i, p in enumerate(accuracies[0])]
    paths += [[[i, j], 1000 * p * r] for i, p in enumerate(accuracies[0]) for j, r in enumerate(accuracies[1])]
    paths = [[path, round(count)] for path, count in paths]
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"paths": paths, "positions": positions}))
    tree = MedusaTree([(0,), (1,), (0, 0), (1, 1)])
    rate = Calibration.load(file).expected_acceptance_length(tree)
    assert rate == pytest.approx(expected_acceptance_length(tree, accuracies))


@pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"paths": [[1]], "positions": 3}', '{"paths": [], "positions": 0}'])
def test_a_file_that_is_no_calibration_is_refused(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"not a calibration written by medusa tune|calibration\.json is not valid JSON"):
        Calibration.load(tmp_path / "calibration.json")
    with pytest.raises(CheckpointError, match="no calibration"):
        Calibration.load(tmp_path / "nowhere.json")


def test_nonsense_is_refused():
    for sizes, words in (((0, 128, 1), "batch is 0"), ((1, 0, 1), "length is 0"), ((1, 128, 0), "candidates is 0")):
        with pytest.raises(InvalidInput, match=words):
            BLOCK.seconds(*sizes)
    with pytest.raises(InvalidInput, match="weights of 0 bits"):
        Setting(BUILT_IN["llama-7b"], A100, weight_bits=0)
    with pytest.raises(InvalidInput, match="-1 heads"):
        Setting(BUILT_IN["llama-7b"], A100, num_heads=-1)
