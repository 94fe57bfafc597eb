"""Claims about the roofline: the paper's Tables 6 to 8, computed and measured there."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import pytest
from scipy.optimize import minimize

from medusa.errors import InvalidInput
from medusa.simulation.hardware import load_hardware
from medusa.simulation.roofline import PAPER_TABLES, paper_table, points, scatter
from medusa.simulation.shapes import BUILT_IN

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
A100 = load_hardware("a100-80gb-pcie")


def errors(number, hardware=A100, rate="predicted"):
    cells = zip(paper_table(number, hardware), PAPER[f"table{number}"], strict=True)
    return [getattr(cell, rate) / 1e12 / tflops - 1 for cell, (_, _, tflops, _) in cells]


@pytest.mark.parametrize("number", PAPER_TABLES)
def test_operational_intensities_are_the_papers_in_every_cell(number):
    cells = paper_table(number, A100)
    rows = [(cell.length if number == 6 else cell.batch, cell.candidates, round(cell.intensity, 2)) for cell in cells]
    assert rows == [(row, candidates, intensity) for row, candidates, _, intensity in PAPER[f"table{number}"]]


@pytest.mark.parametrize("number", PAPER_TABLES)
def test_predicted_flops_are_near_those_the_paper_measured(number):
    found = [abs(error) for error in errors(number)]
    assert median(found) < 0.08 and max(found) < 0.25


@pytest.mark.parametrize("number", PAPER_TABLES)
def test_a_bare_roofline_is_far_off_where_launches_count(number):
    bare = [abs(error) for error in errors(number, rate="attainable")]
    assert median(bare) > 0.45
    assert all(error > -0.02 for error in errors(number, rate="attainable"))  # it is a bound; the paper rounds


def test_the_shipped_terms_are_the_fit_to_the_papers_measurements():
    names = ("launch", "bandwidth_share", "compute_share")

    def loss(terms):
        if min(terms) <= 0:
            return 1e9
        hardware = replace(A100, **dict(zip(names, (1e-6 * terms[0], *terms[1:]), strict=True)))
        return sum(mean(abs(error) for error in errors(number, hardware)) for number in PAPER_TABLES)

    fitted = minimize(loss, (20, 0.8, 0.8), method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-5})
    shipped = (1e6 * A100.launch, A100.bandwidth_share, A100.compute_share)
    assert loss(shipped) < 1.02 * fitted.fun


def test_the_papers_claims_about_attention_hold():
    by_batch = {(cell.batch, cell.candidates): cell for cell in paper_table(7, A100)}
    assert len({cell.intensity for (_, q), cell in by_batch.items() if q == 64}) == 1  # batch does not change it
    plain, tree = by_batch[16, 1], by_batch[16, 64]
    assert tree.intensity / plain.intensity == pytest.approx(41, abs=0.5)
    assert tree.predicted / plain.predicted == pytest.approx(44, rel=0.2)


def test_the_scatter_has_49_settings_of_each_operator_and_phase():
    found = scatter(BUILT_IN["llama-7b"], A100)
    assert len(found) == 49 * 8 * 2
    assert all(point.predicted < point.attainable for point in found)
    linear = {point.intensity for point in found if point.operator == "up" and point.phase == "decoding" and point.batch == 8}
    assert len(linear) == 1  # linear layers do not see the length


def test_points_cover_prefill_decoding_and_medusa():
    found = points(BUILT_IN["llama-7b"], A100, batch=1, length=128, candidates=16)
    assert [(p.phase, p.candidates) for p in found if p.operator == "qk"] == [("prefill", 128), ("decoding", 1), ("medusa", 16)]


def test_other_tables_and_sizes_of_nothing_are_refused():
    with pytest.raises(InvalidInput, match="expected one of 6, 7, 8"):
        paper_table(5, A100)
    with pytest.raises(InvalidInput, match="batch is 0"):
        points(BUILT_IN["llama-7b"], A100, batch=0, length=128)
