"""Claims about medusa simulate: tables as the paper has them, predictions that add up, figures, errors of one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medusa import MedusaTree
from medusa.cli import app
from medusa.trees.files import save_tree

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())


TWO_BATCHES = ["--batch", "1", "--batch", "64", "--context", "256", "--context", "1024"]
THREE_SIZES = ["--nodes", "1", "--nodes", "16", "--nodes", "64"]


def simulate(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("number", [6, 7, 8])
def test_paper_tables_are_lists_in_the_papers_order(number):
    rows = json.loads(simulate("--paper-table", str(number), "--json"))
    assert all(set(row) == {"row", "candidates", "tflops", "operational_intensity"} for row in rows)
    found = [[row["row"], row["candidates"], round(row["operational_intensity"], 2)] for row in rows]
    assert found == [[row, candidates, intensity] for row, candidates, _, intensity in PAPER[f"table{number}"]]
    assert all(
        row["tflops"] == pytest.approx(cell[2], rel=0.25) for row, cell in zip(rows, PAPER[f"table{number}"], strict=True)
    )


def test_predictions_name_the_best_size_and_where_trees_stop_paying():
    record = json.loads(simulate("llama-13b", *TWO_BATCHES, *THREE_SIZES, "--json"))
    assert len(record["points"]) == 2 * 2 * 3
    for top in record["best"]:
        alike = [p for p in record["points"] if (p["batch"], p["length"]) == (top["batch"], top["length"])]
        assert top["speedup"] == max(p["speedup"] for p in alike)
    assert [stop["length"] for stop in record["stops_paying"]] == [256, 1024]
    assert all(1 < stop["batch"] < 64 for stop in record["stops_paying"])
    assert record["memory_bytes"] == pytest.approx(26e9 + 2 * 40 * 64 * 1024 * 5120 * 2, rel=0.01)


def test_the_embedded_model_with_its_own_calibration_and_a_tree(tmp_path):
    law, own = (
        json.loads(simulate("embedded", "--batch", "1", *more, "--json")) for more in ([], ["--calibration", "embedded"])
    )
    assert law["acceleration"] != own["acceleration"] == "calibrated"
    save_tree(MedusaTree.dense([3, 2]), tmp_path / "tree.json")
    tree = json.loads(
        simulate("embedded", "--batch", "1", "--tree", str(tmp_path / "tree.json"), "--calibration", "embedded", "--json")
    )
    assert len(tree["points"]) == 2 and tree["points"][1]["acceleration_rate"] > 1.5


def test_text_shows_speedups_and_roofline_rows():
    assert "no tree pays off from batch size" in simulate("--batch", "1", "--batch", "32")
    rows = json.loads(simulate("--roofline", "--batch", "1", "--batch", "2", "--nodes", "1", "--nodes", "16", "--json"))
    assert len(rows) == 2 * 3 * 9  # prefill and decoding once each, not again for every number of candidates
    assert "medusa" in simulate("--roofline", "--batch", "1", "--nodes", "16")


def test_figures_are_written_as_png_and_svg(tmp_path):
    simulate("--plots", str(tmp_path), "--paper-block", "--batch", "1")
    names = {"roofline", "attention_by_length", "attention_by_batch", "linear_by_batch", "candidates", "batches", "lengths"}
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "roofline.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hardware", "abacus"], "no hardware 'abacus'; known: a100-80gb-pcie"),
        (["--weight-bits", "99"], "weights of 99 bits, expected 1 to 16 for bfloat16"),
        (["--roofline", "--measure"], "give one of"),
    ],
)
def test_nonsense_is_refused(arguments, words):
    from medusa.errors import MedusaError

    with pytest.raises(MedusaError, match=words):
        CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)


@pytest.mark.parametrize("option", ["--batch 0", "--nodes many", "--context 0", "--paper-table 9", "--dtype int4"])
def test_values_out_of_range_are_usage_errors(option):
    done = CliRunner().invoke(app, ["simulate", *option.split()], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and f"'{option.split()[0]}'" in done.output


def test_errors_are_one_line():
    command = [sys.executable, "-m", "medusa", "simulate", "--hardware", "abacus"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_fleet_serves_within_a_limit_and_under_a_load():
    options = ["llama-3-8b", "--hardware", "h100-sxm", "--shared-lm-head", "--launch", "0", "--limit", "5", "--load", "4000"]
    record = json.loads(simulate(*options, "--replicas", "4", "--price", "2", "--json"))
    limit, load = record["rows"]
    assert (limit["asked"], load["asked"]) == ("5 ms", "4000 tokens/s")
    assert limit["medusa"]["tokens_per_second"] > 2 * limit["plain"]["tokens_per_second"] and limit["medusa"]["nodes"] > 1
    assert limit["medusa"]["milliseconds_per_token"] <= 5 and load["plain"]["tokens_per_second"] >= 4000
    assert load["medusa"]["milliseconds_per_token"] < load["plain"]["milliseconds_per_token"]
    fleet_hours = 4 * 2 * 1e6 / 3600 / limit["plain"]["tokens_per_second"]
    assert limit["plain"]["cost"] == pytest.approx(fleet_hours)
    slow = simulate(*options[:4], "--limit", "1", "--limit", "50")
    assert "1 ms" in slow and slow.count(" - ") == 9 and "llama-3-8b on 1 x h100-sxm" in slow
