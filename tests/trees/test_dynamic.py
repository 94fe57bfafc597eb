"""Dynamic trees: the likeliest nodes of this context, and nothing but the backbone's own output."""

import heapq
import math

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from medusa import DynamicTree, MedusaModel, MedusaTree
from medusa.errors import ConfigError, InvalidTree
from medusa.trees.dynamic import LEAST_COST, rest_of, tempered
from medusa.trees.files import TreeChoice, load_tree, save_tree
from medusa.trees.history import History
from tiny import VOCAB, random_heads, random_prompt, tiny_backbone


def by_heap(tree: DynamicTree, root: int, tokens, log_p, said) -> set[tuple[int, ...]]:
    """The tokens along every chosen path, best first by a heap: the obvious way to do it."""

    def children(path, value, before, previous):
        if len(path) == tree.depth:
            return
        for token, p in zip(tokens[len(path)], log_p[len(path)], strict=True):
            bonus = tree.pair_bonus * said(previous, token) + tree.triple_bonus * said(before, previous, token)
            p = min(p, -LEAST_COST)
            odds = p - math.log(-math.expm1(p)) + bonus
            yield -(value - math.log1p(math.exp(-odds)) - LEAST_COST), (*path, token), previous, token

    frontier = list(children((), 0.0, 99, root))
    heapq.heapify(frontier)
    chosen: set[tuple[int, ...]] = set()
    while frontier and len(chosen) < tree.num_nodes - 1:
        negative, path, before, previous = heapq.heappop(frontier)
        chosen.add(path)
        for child in children(path, -negative, before, previous):
            heapq.heappush(frontier, child)
    return chosen


@pytest.mark.parametrize("bonus", [0.0, 0.3])
@pytest.mark.parametrize("nodes", [2, 7, 40])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_dynamic_tree_holds_the_likeliest_nodes(nodes, bonus, drawn):
    tree = DynamicTree(nodes, depth=3, ranks=6, temperatures=(1.0, 0.8, 1.3), pair_bonus=bonus, triple_bonus=bonus)
    drafter, generator = tree.drafter(), torch.Generator().manual_seed(nodes)
    batch, vocab = 3, 20
    prompts = torch.randint(vocab, (batch, 30), generator=generator)
    prompts[:, -1] = 99 % vocab
    root = torch.randint(vocab, (batch,), generator=generator)
    guesses = drafter.guess(3 * torch.randn(3, batch, vocab, generator=generator))
    scores = guesses.log_p
    if drawn:
        guesses = guesses._replace(noise=torch.randn(scores.shape, generator=generator))
        scores = scores + guesses.noise
    history = History.of(prompts, torch.zeros(batch, dtype=torch.long), root, 4096)
    history.last[:] = 99
    got, tensors = drafter.assemble(root, guesses, history)
    assert tensors.lineage.shape == (batch, nodes, 4)
    for row in range(batch):
        text = [*prompts[row].tolist(), int(root[row])]
        runs = {tuple(text[i : i + n]) for n in (2, 3) for i in range(len(text) - n + 1)}
        log_p = tempered(scores, rest_of(guesses.log_p), torch.tensor(tree.temperatures)[:, None])[:, row].tolist()
        wanted = by_heap(tree, int(root[row]), guesses.tokens[:, row].tolist(), log_p, lambda *run, runs=runs: run in runs)
        lineages = [[n for n in lineage if n >= 0] for lineage in tensors.lineage[row].tolist()]
        assert {tuple(got[row, lineage[1:]].tolist()) for lineage in lineages[1:]} == wanted
        for node, lineage in enumerate(lineages):
            assert lineage[-1] == node and lineage == sorted(lineage)  # parents come before children
            assert tensors.depths[row, node] == len(lineage) - 1
            assert tensors.parents[row, node] == (lineage[-2] if node else 0)
            assert tensors.ancestors[row, node].nonzero().flatten().tolist() == lineage


def test_the_likeliest_path_is_numbered_first():
    head_logits = torch.log(torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]], [[0.7, 0.3]]]))
    drafter = DynamicTree(6, depth=3, pair_bonus=0.0, triple_bonus=0.0).drafter()
    tokens, tree = drafter.assemble(torch.tensor([1]), drafter.guess(head_logits))
    assert tree.lineage[0, 3].tolist() == [0, 1, 2, 3]
    assert tokens[0, :4].tolist() == [1, 0, 1, 0]


def test_a_small_vocabulary_gives_a_smaller_tree():
    drafter = DynamicTree(50, depth=2, ranks=9).drafter()
    tokens, tree = drafter.assemble(torch.tensor([0]), drafter.guess(torch.randn(2, 1, 3)))
    assert tokens.shape == (1, 1 + 3 + 9) and tree.num_nodes == 13


TREES = [
    DynamicTree(2, 1),
    DynamicTree(16, 3),
    DynamicTree(60, 3, ranks=64, pair_bonus=0.0, triple_bonus=0.0),
    DynamicTree(24, 2, temperatures=(0.5, 2.0), pair_bonus=8.0),
    DynamicTree(24, 2, copied=9),
    DynamicTree(4, 1, ranks=1, pair_bonus=0.0, triple_bonus=0.0, copied=2),
]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7, "seed": 3}, {"repetition_penalty": 1.3}])
def test_dynamic_trees_change_nothing_but_the_steps(tiny_model, tree, options):
    prompts = torch.cat([random_prompt(9), random_prompt(9, seed=5)])
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    plain = tiny_model.generate(prompts, mask, max_new_tokens=24, tree=MedusaTree([]), **options)
    assert tiny_model.generate(prompts, mask, max_new_tokens=24, tree=tree, **options).equal(plain)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts_have_a_context_too(tiny_model, tree, length):
    plain = tiny_model.generate(random_prompt(length), max_new_tokens=16, tree=MedusaTree([]))
    assert tiny_model.generate(random_prompt(length), max_new_tokens=16, tree=tree).equal(plain)


def test_a_repeating_text_is_drafted_from_what_it_said():
    """Heads that know nothing guess by the context alone: all tokens are equally likely to them."""
    backbone = tiny_backbone()
    heads = random_heads(backbone, 2)
    model = MedusaModel(backbone, heads)
    prompt = random_prompt(6)
    options = {"max_new_tokens": 200, "return_dict_in_generate": True, "eos_token_id": []}
    plain = model.generate(prompt, tree=MedusaTree([]), **options)
    told = model.generate(prompt, tree=DynamicTree(4, 2, ranks=VOCAB, pair_bonus=9.0, triple_bonus=9.0), **options)
    alone = model.generate(prompt, tree=DynamicTree(4, 2, ranks=VOCAB, pair_bonus=0.0, triple_bonus=0.0), **options)
    assert told.sequences.equal(plain.sequences) and alone.sequences.equal(plain.sequences)
    assert told.steps < alone.steps <= plain.steps  # greedy text of a tiny model runs in circles
    copied = model.generate(prompt, tree=DynamicTree(18, 2, ranks=1, copied=16), **options)
    assert copied.sequences.equal(plain.sequences)
    assert max(copied.acceptance_lengths[0]) == 17 and copied.steps < told.steps  # round and round, further than the text goes


def test_copied_nodes_are_one_path_below_the_root():
    drafter = DynamicTree(9, 2, copied=4).drafter()
    prompts = torch.tensor([[1, 2, 3, 4, 1], [6, 6, 6, 6, 6]])
    history = History.of(prompts, torch.tensor([0, 0]), torch.tensor([2, 6]), 64)
    guesses = drafter.guess(torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0)))
    tokens, tree = drafter.assemble(torch.tensor([2, 6]), guesses, history)
    assert tokens[:, 5:].tolist() == [[3, 4, 1, 2], [6, 6, 6, 6]]
    assert tree.parents[:, 5:].tolist() == [[0, 5, 6, 7]] * 2 and tree.depths[:, 5:].tolist() == [[1, 2, 3, 4]] * 2


def test_batches_choose_their_own_tree(tiny_model):
    choice = TreeChoice({1: DynamicTree(8, 2), 2: MedusaTree([(0,)])})
    prompts = torch.cat([random_prompt(5), random_prompt(5, seed=1)])
    for rows, tree in ((1, choice.trees[1]), (2, choice.trees[2])):
        options = {"max_new_tokens": 12, "return_dict_in_generate": True}
        chosen, given = (tiny_model.generate(prompts[:rows], tree=t, **options) for t in (choice, tree))
        assert chosen.acceptance_lengths == given.acceptance_lengths


@pytest.mark.parametrize("tree", [TREES[3], TREES[4], MedusaTree([(0,), (0, 4)]), TreeChoice({1: TREES[1], 4: MedusaTree([])})])
def test_trees_of_every_kind_survive_a_file(tree, tmp_path):
    save_tree(tree, tmp_path / "tree.json")
    assert load_tree(tmp_path / "tree.json") == tree


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"dynamic": {"num_nodes": 16, "deepth": 2}}', ConfigError, "did you mean 'depth'"),
        ('{"dynamic": {"num_nodes": 1, "depth": 2}}', InvalidTree, "num_nodes of a dynamic tree is 1"),
        ('{"dynamic": {"num_nodes": 4, "depth": 2, "temperatures": [1.0]}}', InvalidTree, "expected 2 above 0"),
        ('{"dynamic": {"num_nodes": 4, "depth": 2, "temperatures": ["a", null]}}', InvalidTree, "expected 2 above 0"),
        ('{"dynamic": {"num_nodes": 4, "depth": 2, "copied": 3}}', InvalidTree, "expected 0 to 2"),
        ('{"dynamic": {"num_nodes": 4, "depth": 2, "pair_bonus": -1.0}}', InvalidTree, "pair_bonus"),
        ('{"dynamic": {"num_nodes": 4, "depth": 2, "pair_bonus": "x"}}', (InvalidTree, ConfigError), "pair_bonus"),
        ('{"batches": {"0": {"paths": []}}}', InvalidTree, "at least 1"),
        ('{"batches": {}}', InvalidTree, "at least 1"),
    ],
)
def test_broken_tree_files_are_refused(text, error, message, tmp_path):
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(error, match=message):
        load_tree(tmp_path / "tree.json")


def test_processors_are_asked_only_where_the_tree_has_nodes(tiny_model):
    """A tree of two nodes never reaches depth 2."""

    class Reads(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[torch.arange(len(scores)), input_ids[:, -1]] -= float(input_ids[0, -1] >= 0)
            return scores

    options = {"max_new_tokens": 12, "logits_processor": LogitsProcessorList([Reads()])}
    plain = tiny_model.generate(random_prompt(7), tree=MedusaTree([]), **options)
    assert tiny_model.generate(random_prompt(7), tree=DynamicTree(2, 3), **options).equal(plain)


def test_a_dynamic_tree_deeper_than_the_heads_is_refused(tiny_model):
    with pytest.raises(InvalidTree, match="needs 9 heads, there are 3"):
        tiny_model.generate(random_prompt(4), tree=DynamicTree(8, 9))
    assert math.isclose(DynamicTree(8, 2).temperatures[0], 1.0)
