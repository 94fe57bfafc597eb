"""Claims about replay: it takes the very steps that decoding takes."""

import pytest
import torch

from medusa import DynamicTree, MedusaModel, MedusaTree
from medusa.errors import InvalidInput
from medusa.trees.calibration import Calibration
from medusa.trees.dynamic import rest_of, tempered
from medusa.trees.search import search_joint_tree
from medusa.tuning.recording import Recorded, record
from medusa.tuning.replay import fit_dynamic_tree, fit_static_tree, fit_temperatures, replay_texts
from tiny import VOCAB, left_padded, random_heads, random_prompt, random_tree, tiny_backbone

NEW = 30


@pytest.fixture(scope="module")
def model() -> MedusaModel:
    backbone = tiny_backbone(eos_token_id=None)
    return MedusaModel(backbone, random_heads(backbone, 3), MedusaTree([]))


@pytest.fixture(scope="module", params=[0.0, 0.8])
def recorded(request, model):
    prompts = [random_prompt(length, seed=length) for length in (5, 11, 8)]
    texts = record(model, [prompt[0] for prompt in prompts], NEW, ranks=VOCAB - 4, temperature=request.param, batch_size=3)
    sampling = {"do_sample": True, "temperature": request.param, "seed": 0} if request.param else {}
    return left_padded(prompts), texts, sampling


@pytest.mark.parametrize(
    "tree",
    [
        MedusaTree([]),
        random_tree(seed=2, nodes=40, ranks=60),
        DynamicTree(12, 3, ranks=60, pair_bonus=0.0, triple_bonus=0.0),
        DynamicTree(12, 2, ranks=20, pair_bonus=1.0, triple_bonus=3.0),
        DynamicTree(12, 3, ranks=20, temperatures=(0.5, 2.0, 1.5)),
        DynamicTree(12, 2, ranks=20, copied=7),
    ],
)
def test_replay_takes_the_steps_that_decoding_takes(model, recorded, tree):
    (ids, mask), texts, sampling = recorded
    output = model.generate(ids, mask, max_new_tokens=NEW, tree=tree, return_dict_in_generate=True, **sampling)
    replayed = replay_texts(texts, tree)
    assert replayed.steps.tolist() == [len(lengths) for lengths in output.acceptance_lengths]
    assert replayed.tokens.tolist() == [sum(lengths) for lengths in output.acceptance_lengths]


@pytest.mark.parametrize("nodes", [3, 12])
def test_what_comes_true_where_steps_begin_is_what_they_accept(recorded, nodes):
    _, texts, _ = recorded
    tree = fit_static_tree(texts, nodes)
    replayed = replay_texts(texts, tree)
    everywhere = search_joint_tree(Calibration.of(texts).paths, nodes)
    assert replayed.acceleration_rate >= replay_texts(texts, everywhere).acceleration_rate
    counted = Calibration.of(texts, replayed.began)
    assert counted.positions == int(replayed.steps.sum())
    accepted = counted.positions + sum(count for path, count in counted.paths if path in tree.paths)
    assert 0 <= accepted - int(replayed.tokens.sum()) <= tree.depth * len(texts)  # the last step of a text is cut


def test_a_static_tree_is_as_deep_as_was_asked_for(recorded):
    assert fit_static_tree(recorded[1], 12, depth=1).depth == 1


def test_what_was_not_recorded_is_refused(model):
    texts = record(model, [random_prompt(5)[0]], 4, ranks=3)
    for tree in (MedusaTree([(3,)]), MedusaTree.dense([1, 1, 1, 1]), DynamicTree(4, 3, ranks=4)):
        with pytest.raises(InvalidInput, match="recorded were 3 with 3"):
            replay_texts(texts, tree)


def test_tempered_log_probabilities_are_those_of_divided_logits():
    logits = torch.randn(4, 9, dtype=torch.double)
    wanted = (logits / 0.6).log_softmax(-1).sort(descending=True).values[:, :8]
    top = logits.log_softmax(-1).sort(descending=True).values[:, :8]  # but one: the rest is that one
    torch.testing.assert_close(tempered(top, rest_of(top), 0.6), wanted)


def test_fitted_temperatures_make_overconfident_heads_honest():
    generator = torch.Generator().manual_seed(0)
    honest = (2 * torch.randn(4000, 1, 10, generator=generator)).log_softmax(-1)
    said = torch.multinomial(honest[:, 0].exp(), 1, generator=generator)[:, 0]
    claimed = (honest * 2).log_softmax(-1).sort(descending=True)  # twice as sure as it should be
    ids = torch.cat([torch.zeros(2, dtype=torch.long), said])
    text = Recorded(ids, 0, claimed.indices.int(), claimed.values)
    assert fit_temperatures([text])[0] == pytest.approx(2.0, rel=0.1)


def test_bonuses_are_fitted_only_where_they_help():
    """Heads that know nothing, on a text that repeats itself and on one that does not."""
    generator = torch.Generator().manual_seed(0)

    def text(ids: torch.Tensor) -> Recorded:
        places = len(ids) - 3 - 2
        guesses = torch.stack([torch.randperm(50, generator=generator) for _ in range(places * 2)]).view(places, 2, 50)
        return Recorded(ids, 1, guesses.int(), torch.full(guesses.shape, 1 / 50).log())

    again = torch.randint(50, (20,), generator=generator).repeat(6)
    tree = fit_dynamic_tree([text(again)], num_nodes=4)
    assert tree.pair_bonus + tree.triple_bonus > 0
    assert replay_texts([text(again)], tree).acceleration_rate > 1.5
    once = torch.arange(50)[torch.randperm(50, generator=generator)]
    assert fit_dynamic_tree([text(once)], num_nodes=4).pair_bonus == 0
