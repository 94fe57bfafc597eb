"""Claims about tuning: it picks what its figures say is fastest, and plain decoding where nothing pays."""

import json

import pytest
import torch

from medusa import DynamicTree, MedusaModel, MedusaTree
from medusa.errors import InvalidInput
from medusa.trees.calibration import Calibration
from medusa.tuning.choice import choose_trees
from medusa.tuning.options import Trees
from medusa.tuning.plots import draw_calibration, draw_choices
from medusa.tuning.recording import record
from medusa.tuning.timing import time_steps
from tiny import VOCAB, random_heads, random_prompt, tiny_backbone


@pytest.fixture(scope="module")
def model() -> MedusaModel:
    backbone = tiny_backbone(eos_token_id=None)
    return MedusaModel(backbone, random_heads(backbone, 2), MedusaTree([]))


@pytest.fixture(scope="module")
def trees(model) -> Trees:
    prompts = [random_prompt(6, seed=seed)[0] for seed in range(8)]
    return Trees(record(model, prompts, 24, ranks=VOCAB))


def machine(per_node: float, per_row: float = 0.0):
    """A made-up machine: seconds of a step by the nodes of a tree and the rows of a batch."""

    def measure(tried, batch):
        return [1.0 + per_node * (len(tree) - 1) + per_row * (batch - 1) * (len(tree) - 1) for tree in tried]

    return measure


SIZES = (2, 8, 32)


def test_where_nodes_are_free_the_tree_that_accepts_most_is_chosen(trees):
    tuned = choose_trees(trees, machine(0.0), sizes=SIZES)
    best = max([*tuned.options, *tuned.by_depth], key=lambda option: option.acceleration_rate)
    assert tuned.chosen[1].acceleration_rate == best.acceleration_rate > 1.02
    assert tuned.recommended_heads == tuned.chosen[1].tree.depth


def test_on_a_slow_machine_plain_decoding_is_chosen(trees):
    tuned = choose_trees(trees, machine(1.0), sizes=SIZES)
    assert tuned.chosen[1].kind == "plain" and tuned.recommended_heads == 0
    assert choose_trees(trees, machine(1.0), sizes=SIZES, always=True).chosen[1].kind != "plain"


def test_a_tree_is_as_deep_as_its_heads_are_worth(trees):
    """Of every size: all heads where they are free and help, one where each costs more than it brings."""

    def timed(per_head: float):
        return choose_trees(trees, lambda tried, batch: [1.0 + per_head * tree.depth for tree in tried], ("dynamic",), SIZES)

    for option in timed(0.0).options:
        every = [trees.option("dynamic", len(option.tree), depth) for depth in trees.depths("dynamic", len(option.tree))]
        assert option.acceleration_rate == max(each.acceleration_rate for each in every)
    assert {option.tree.depth for option in timed(5.0).options} == {1}


def test_each_size_is_timed_at_one_depth_once_a_few_told_what_heads_cost(trees):
    seen = []

    def measure(tried, batch):
        seen.append(list(tried))
        return machine(0.01)(tried, batch)

    tuned = choose_trees(trees, measure, ("dynamic",), SIZES)
    probed, chosen, depths = seen
    assert all(tried[0] == MedusaTree([]) for tried in seen)
    assert [(len(tree), tree.depth) for tree in probed[1:]] == [(2, 1), (8, 1), (8, 2), (32, 1), (32, 2)]
    assert [len(tree) for tree in chosen[1:]] == list(SIZES)
    assert [tree.depth for tree in depths[1:]] == list(trees.depths("dynamic", len(tuned.chosen[1].tree)))


def test_where_timing_is_dear_sizes_far_from_the_fastest_are_left_out_and_the_choice_is_the_same(trees):
    kinds, sizes = ("static", "dynamic"), (2, 4, 8, 16, 32)
    every = choose_trees(trees, machine(0.1), kinds, sizes)
    near = choose_trees(trees, machine(0.1), kinds, sizes, slower=1.15)
    assert {option.tree for option in near.options} < {option.tree for option in every.options}
    assert near.chosen[1].tree == every.chosen[1].tree


def test_a_tree_has_one_time(trees):
    jitter = iter(range(10**6))

    def measure(tried, batch):
        return [seconds * (1 + 0.01 * (next(jitter) % 7)) for seconds in machine(0.01)(tried, batch)]

    tuned = choose_trees(trees, measure, ("dynamic",), SIZES)
    times = {}
    for option in [*tuned.options, *tuned.by_depth, *tuned.chosen.values()]:
        assert times.setdefault(option.tree, option.step_seconds[1]) == option.step_seconds[1]


def test_larger_batches_get_smaller_trees(trees):
    tuned = choose_trees(trees, machine(0.001, per_row=0.02), sizes=SIZES, batches=(1, 64))
    assert len(tuned.chosen[64].tree) < len(tuned.chosen[1].tree)


def test_the_choice_has_the_most_tokens_a_second_of_all_that_was_tried(trees):
    tuned = choose_trees(trees, machine(0.01), kinds=("static", "dynamic", "independent"), sizes=SIZES)
    rates = {option.name: option.acceleration_rate / option.step_seconds[1] for option in tuned.options}
    assert tuned.chosen[1].tokens_per_second(1) >= max(rates.values())
    assert {option.kind for option in tuned.options} == {"static", "dynamic", "independent"}


def test_acceptance_is_judged_on_texts_that_the_tree_was_not_chosen_on(model):
    """Two kinds of text that share nothing: a tree of one is no good for the other, and the figure says so."""
    texts = record(model, [random_prompt(6, seed=seed)[0] for seed in range(2)], 24, ranks=VOCAB)
    own = Trees(texts[:1] * 2).option("static", 6)
    other = Trees(texts).option("static", 6)
    assert own.acceleration_rate > other.acceleration_rate


def test_noise_in_a_timing_promises_no_more_than_is_accepted(trees):
    """A plain step that reads ten times too long once, at whichever time it is measured."""
    for bad in range(5):
        calls = []

        def measure(tried, batch, calls=calls, bad=bad):
            calls.append(tried)
            seconds = machine(0.3)(tried, batch)
            return [10.0 * seconds[0], *seconds[1:]] if len(calls) == bad + 1 else seconds

        tuned = choose_trees(trees, measure, sizes=SIZES)
        for option in [*tuned.options, *tuned.by_depth, *tuned.chosen.values()]:
            assert option.tokens_per_second(1) / tuned.plain.tokens_per_second(1) <= option.acceleration_rate + 1e-9


def test_a_single_text_cannot_judge(model):
    with pytest.raises(InvalidInput, match="expected at least two"):
        Trees(record(model, [random_prompt(6)[0]], 8))


def test_steps_are_timed_for_every_tree(model):
    prompts = torch.cat([random_prompt(9), random_prompt(9, seed=1)])
    tried = [MedusaTree([]), MedusaTree.dense([2, 2]), DynamicTree(8, 2)]
    seconds = time_steps(model, tried, prompts, steps=3, rounds=2)
    assert len(seconds) == 3 and all(0 < each < 60 for each in seconds)


def test_steps_of_a_tree_that_accepts_all_there_is_are_timed_too(model):
    """A greedy tiny model runs in circles: a copied path of 40 tokens soon ends the text."""
    prompts = model.generate(random_prompt(6), max_new_tokens=120, tree=MedusaTree([]))
    seconds = time_steps(model, [MedusaTree([]), DynamicTree(42, 1, ranks=1, copied=40)], prompts, steps=5, rounds=1)
    assert all(0 < each < 60 for each in seconds)


def test_what_was_tried_is_told_and_drawn(trees, tmp_path):
    tuned = choose_trees(trees, machine(0.01, 0.001), sizes=SIZES, batches=(1, 4))
    record = json.loads(json.dumps(tuned.to_dict()))
    assert set(record["chosen"]) == {"1", "4"} and record["plain"]["batches"]["4"]["speedup"] == 1.0
    for name, start in (("curve.png", b"\x89PNG"), ("curve.svg", b"<?xml")):
        draw_choices(tuned, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_a_calibration_is_drawn_with_what_independence_leaves_out(tmp_path):
    hits = [[60, 20], [30, 10]]
    draw_calibration(Calibration(hits, 100, [((0,), 60), ((0, 0), 29), ((1,), 20)]), tmp_path / "calibration.svg")
    drawn = (tmp_path / "calibration.svg").read_text()
    for label in ("head 1", "head 2", "where the heads before were right"):
        assert f"<!-- {label} -->" in drawn
