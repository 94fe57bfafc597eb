"""Claims about drawings of trees."""

import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from medusa import MedusaTree
from medusa.errors import InvalidInput
from medusa.metrics import path_chances
from medusa.trees.draw import draw_tree, layout, tree_figure
from medusa.trees.files import preset
from tiny import random_tree

ACCURACIES = [[0.6, 0.1, 0.05], [0.4, 0.1], [0.3]]
TREES = [
    preset("vicuna_7b_stage2"),
    MedusaTree.dense([3, 2, 4]),
    random_tree(1, 80, depth=5),
    MedusaTree([(7,)]),
    MedusaTree([]),
]


@pytest.mark.parametrize("tree", TREES, ids=repr)
def test_nodes_lie_a_row_a_head_in_order_and_apart_with_parents_over_their_children(tree):
    places = layout(tree)
    assert list(places) and set(places) == {(), *tree.paths}
    for depth in range(tree.depth + 1):
        row = [places[path] for path in ((), *tree.paths) if len(path) == depth]
        assert {y for _, y in row} == {-depth}
        assert all(right - left >= 1 for (left, _), (right, _) in pairwise(row))
    for parent in places:
        across = [places[path][0] for path in tree.paths if path[:-1] == parent]
        assert not across or min(across) <= places[parent][0] <= max(across)


def drawn(figure):
    """The rank labels, the percentages, the edges' colours and the nodes' fills of a drawing."""
    axes = figure.axes[0]
    edges, nodes = axes.collections
    labels = [text for text in axes.texts if text.get_text() != "root"]
    ranks = [text.get_text() for text in labels if text.get_bbox_patch() is None]
    shares = [float(text.get_text()) for text in labels if text.get_bbox_patch() is not None]
    return ranks, shares, edges.get_colors(), nodes


def is_red(colour) -> bool:
    return colour[0] > 0.8 and colour[1] < 0.2


def test_drawing_shows_every_node_by_rank_and_chance_and_the_marked_path_red():
    tree = MedusaTree([(0,), (0, 0), (0, 1), (0, 1, 0), (2,)])
    chances = path_chances(tree, ACCURACIES)
    figure = tree_figure(tree, chances, mark=(0, 1, 0))
    ranks, shares, edges, nodes = drawn(figure)
    assert ranks == ["0", "0", "1", "0", "2"]
    assert shares == pytest.approx([60, 24, 6, 1.8, 5])
    assert [is_red(colour) for colour in edges] == [True, False, True, True, False]
    assert nodes.get_array().tolist() == list(chances.values())
    assert figure.axes[0].get_title() == "6 nodes, 1.97 tokens per step expected"


def test_drawing_without_chances_has_no_percentages_and_nothing_red_but_by_mark():
    ranks, shares, edges, _ = drawn(tree_figure(MedusaTree.dense([2, 2])))
    assert ranks == ["0", "0", "1", "1", "0", "1"] and not shares
    assert not any(map(is_red, edges))


@pytest.mark.parametrize("tree", TREES, ids=repr)
def test_files_are_what_their_suffix_says(tree, tmp_path):
    draw_tree(tree, tmp_path / "new" / "tree.svg", path_chances(tree, ACCURACIES), tree.paths[0] if tree.paths else ())
    texts = [node.text for node in ElementTree.parse(tmp_path / "new" / "tree.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert "root" in texts and all(f"head {head}" in texts for head in range(1, tree.depth + 1))
    draw_tree(tree, tmp_path / "tree.png")
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")


def test_huge_tree_is_drawn_within_what_a_png_can_hold(tmp_path):
    draw_tree(MedusaTree([(rank,) for rank in range(500)]), tmp_path / "wide.png")
    width = int.from_bytes((tmp_path / "wide.png").read_bytes()[16:20], "big")
    assert 5_000 < width < 20_000


@pytest.mark.parametrize(
    ("name", "mark", "message"),
    [
        ("tree.gif", (), r"a drawing is \.png or \.svg, got .*tree\.gif"),
        ("tree", (), r"\.png or \.svg"),
        ("tree.svg", (0, 9), r"no path \[0, 9\] to mark"),
        ("file/tree.svg", (), "cannot write"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name, mark, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=message):
        draw_tree(MedusaTree([(0,)]), tmp_path / name, mark=mark)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_matplotlib_the_remedy_is_named(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.collections'] = None\n"
        "from medusa import MedusaTree; from medusa.errors import InvalidInput; from medusa.trees.draw import tree_figure\n"
        "try: tree_figure(MedusaTree([(0,)]))\n"
        "except InvalidInput as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "medusa-decoding[plots]" in done.stdout, done.stderr
