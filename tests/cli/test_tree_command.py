"""Claims about `medusa tree`, and about trees by name on the command line."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from medusa import DynamicTree, MedusaTree, load_tree
from medusa.cli import app
from medusa.errors import MedusaError
from medusa.metrics import expected_acceptance_length
from medusa.trees.files import TreeChoice, preset, presets, save_tree
from medusa.trees.search import random_dense_tree, search_joint_tree, search_tree

TABLE = [[0.6, 0.15, 0.05], [0.4, 0.1, 0.1], [0.2, 0.1]]


def gain(tree: MedusaTree) -> float:
    return expected_acceptance_length(tree, TABLE)


@pytest.fixture
def accuracies(tmp_path):
    (tmp_path / "accuracies.json").write_text(json.dumps({"accuracies": TABLE, "model": "some", "asked": [7, 6, 5]}))
    return str(tmp_path / "accuracies.json")


@pytest.fixture
def calibration(tmp_path):
    paths = [[[0], 60], [[0, 0], 50], [[1], 20], [[1, 1], 9], [[0, 1], 4]]
    (tmp_path / "calibration.json").write_text(json.dumps({"paths": paths, "positions": 100, "accuracies": TABLE}))
    return str(tmp_path / "calibration.json")


@pytest.fixture
def tree(capsys):
    """`medusa tree` in this process: its stdout, or its error raised."""

    def run(*arguments: str) -> str:
        app(["tree", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_json_of_a_search_is_one_object_with_the_best_tree(accuracies):
    done = subprocess.run(
        [sys.executable, "-m", "medusa", "tree", "--accuracies", accuracies, "--nodes", "12", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    best = search_tree(TABLE, 12)
    assert record == {"paths": list(map(list, best.paths)), "expected_acceptance_length": pytest.approx(gain(best))}
    assert len(record["paths"]) == 11


def test_calibration_is_searched_by_what_came_true_together(tree, calibration):
    record = json.loads(tree("--calibration", calibration, "--nodes", "4", "--json"))
    counted = [((0,), 60), ((0, 0), 50), ((1,), 20), ((1, 1), 9), ((0, 1), 4)]
    assert MedusaTree(record["paths"]) == search_joint_tree(counted, 4)
    assert record["expected_acceptance_length"] == pytest.approx(1 + 1.3)
    beside = json.loads(tree("--calibration", calibration, "--dense", "2", "--dense", "2", "--json"))
    assert beside["expected_acceptance_length"] == pytest.approx(1 + 1.43)


def test_each_source_gives_its_tree_and_accuracies_beside_it_say_what_it_gains(tree, accuracies, tmp_path):
    save_tree(preset("zephyr_stage2"), tmp_path / "own.json")
    for source, wanted in (
        (["--dense", "4", "--dense", "3", "--dense", "2"], MedusaTree.dense([4, 3, 2])),
        (["--random-dense", "64", "--num-heads", "4", "--seed", "3"], random_dense_tree(64, 4, 3)),
        (["--preset", "vicuna_33b_stage1"], preset("vicuna_33b_stage1")),
        ([str(tmp_path / "own.json")], preset("zephyr_stage2")),
    ):
        record = json.loads(tree(*source, "--json"))
        assert MedusaTree(record["paths"]) == wanted and record["expected_acceptance_length"] is None
        record = json.loads(tree(*source, "--accuracies", accuracies, "--json"))
        assert record["expected_acceptance_length"] == pytest.approx(gain(wanted))


def test_terminal_shows_the_shape_and_the_figures(tree, accuracies):
    assert tree("--accuracies", accuracies, "--nodes", "9").splitlines() == [
        "root (rank, how often its path comes true)",
        "├── 0 0.600",
        "│   ├── 0 0.240",
        "│   │   └── 0 0.048",
        "│   └── 1 0.060  2 0.060",
        "├── 1 0.150",
        "│   └── 0 0.060",
        "└── 2 0.050",
        "nodes 9, depth 3, leaves 5, max rank 2: 2.268 tokens per step expected",
    ]
    assert tree("--dense", "2").splitlines() == ["root", "└── 0  1", "nodes 3, depth 1, leaves 2, max rank 1"]


def test_saved_tree_is_read_back_and_a_drawing_is_made(tree, tmp_path):
    saved, drawing = tmp_path / "new" / "tree.json", tmp_path / "tree.svg"
    tree(
        "--preset",
        "vicuna_7b_stage2",
        "--output",
        str(saved),
        "--draw",
        str(drawing),
        "--mark",
        "0",
        "--mark",
        "0",
        "--mark",
        "1",
    )
    assert load_tree(saved) == preset("vicuna_7b_stage2")
    assert "<svg" in drawing.read_text()


def test_dynamic_trees_and_choices_are_shown_and_saved_but_not_drawn(tree, tmp_path):
    dynamic, choice, copy = (str(tmp_path / name) for name in ("dynamic.json", "choice.json", "copy.json"))
    save_tree(DynamicTree(num_nodes=24, depth=4), dynamic)
    save_tree(TreeChoice({1: DynamicTree(num_nodes=24, depth=4), 8: MedusaTree([(0,), (3,)])}), choice)
    assert re.search(r"built anew at every step\n  num nodes +24 *\n  depth +4", tree(dynamic))
    shown = tree(choice, "--output", copy)
    assert "from batch size 8 on:\nroot\n└── 0  3\n" in shown and "from batch size 1 on:\nbuilt anew at every step\n" in shown
    assert load_tree(copy) == load_tree(choice)
    assert json.loads(tree(dynamic, "--json"))["dynamic"]["num_nodes"] == 24
    for file in (dynamic, choice):
        with pytest.raises(MedusaError, match="only a static tree can be drawn"):
            tree(file, "--draw", str(tmp_path / "tree.svg"))


def test_presets_are_the_published_trees_of_64_nodes(tree):
    names = json.loads(tree("--preset", "list", "--json"))
    assert names == presets() and len(names) == 9 and all(names.values())
    assert all(name in tree("--preset", "list") for name in names)
    for name in names:
        assert len(preset(name)) == 64 and preset(name).max_rank == 9 and preset(name).depth in (3, 4)


def test_a_preset_is_a_tree_by_name_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_tree("zephyr_stage2") == preset("zephyr_stage2")
    save_tree(MedusaTree([(0,)]), "zephyr_stage2")
    assert load_tree("zephyr_stage2") == MedusaTree([(0,)])


def test_generate_takes_a_preset_and_says_the_same(capsys):
    records = []
    for name in ("vicuna_7b_stage2", "root"):
        arguments = ["generate", "embedded", "def f(x):\n", "-n", "12", "--dtype", "float32", "--tree", name, "--json"]
        app(arguments, standalone_mode=False)
        records.append(json.loads(capsys.readouterr().out))
    assert records[0]["token_ids"] == records[1]["token_ids"] and records[0]["steps"] < records[1]["steps"]


def test_inspect_shows_dynamic_tree_files(tmp_path, capsys):
    save_tree(DynamicTree(num_nodes=24, depth=4), tmp_path / "tree.json")
    app(["inspect", str(tmp_path / "tree.json")], standalone_mode=False)
    assert capsys.readouterr().out.split()[:5] == ["tree", "nodes", "24", "depth", "4"]


def test_nodes_beyond_the_accuracies_are_said_to_count_for_nothing(accuracies, capsys):
    app(["tree", "--dense", "4", "--accuracies", accuracies, "--json"], standalone_mode=False)
    captured = capsys.readouterr()
    assert "1 nodes count as 0" in captured.err
    assert json.loads(captured.out)["expected_acceptance_length"] == pytest.approx(1.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one tree"),
        (["--accuracies", "A"], "give one tree"),
        (["--dense", "2", "--preset", "zephyr_stage2"], "give one tree"),
        (["--nodes", "8"], "--nodes needs"),
        (["--nodes", "8", "--accuracies", "A", "--calibration", "A"], "not both"),
        (["--nodes", "4", "--accuracies", "none.json"], "cannot read none.json: No such file"),
        (["--nodes", "4", "--calibration", "none.json"], "no calibration none.json"),
        (["--nodes", "4", "--calibration", "A"], "is not a calibration written by medusa tune"),
        (["--preset", "nobody"], "no tree is called 'nobody'; there are mc_sim_7b_63, "),
        (["nobody"], "no tree is called 'nobody'"),
        (["none.json"], "no tree file none.json"),
        (["A"], "holds no tree"),
        (["--dense", "2", "--draw", "tree.gif"], r"\.png or \.svg, got tree.gif"),
        (["--dense", "2", "--mark", "0", "--mark", "0"], r"no path \[0, 0\] to --mark"),
        (["--dense", "2", "--output", "."], r"cannot write \.: Is a directory"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tree, accuracies, arguments, message):
    with pytest.raises(MedusaError, match=message) as error:
        tree(*[accuracies if argument == "A" else argument for argument in arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["--nodes 0", "--dense x", "--dense 0", "--random-dense 0", "--num-heads 0", "--mark -1"])
def test_values_out_of_range_are_usage_errors(option):
    done = CliRunner().invoke(app, ["tree", *option.split()], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and f"'{option.split()[0]}'" in done.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[[0.5]]", "holds no accuracies"),
        ('{"accuracies": []}', "expected a list for every head"),
        ('{"accuracies": [[0.5], [NaN]]}', "head 2 is nan"),
        ('{"accuracies": [[0.6, 0.8]]}', "add up to 1.4"),
    ],
)
def test_broken_accuracies_are_refused_for_any_source(tree, tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    for source in (["--nodes", "4"], ["--dense", "2"]):
        with pytest.raises(MedusaError, match=message):
            tree(*source, "--accuracies", str(tmp_path / "a.json"))


def test_errors_exit_1_with_one_line():
    done = subprocess.run([sys.executable, "-m", "medusa", "tree", "--nodes", "8"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "medusa: --nodes needs --accuracies FILE or --calibration FILE to search with; give one of them\n"
