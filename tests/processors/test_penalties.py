"""Claims about penalties: every node counts the tokens of its own path, so that a tree gives what plain decoding gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import RepetitionPenaltyLogitsProcessor

from medusa import DynamicTree, MedusaTree
from medusa.errors import InvalidInput
from medusa.processors.penalties import OccurrencePenalty, RepetitionPenalty
from medusa.sampling import NodePaths, NodePrefixes, RowText
from medusa.trees.tensors import tree_tensors
from tiny import VOCAB, left_padded, plain_greedy, random_prompt, random_tree

NEW = 24
SETTINGS = [
    dict(presence_penalty=1.5),
    dict(frequency_penalty=0.7),
    dict(repetition_penalty=1.3),
    dict(presence_penalty=-0.5, frequency_penalty=0.4, repetition_penalty=1.2),
]


@st.composite
def texts_with_trees(draw):
    """A padded text and a tree of any shape behind it, with few different tokens, so that they recur."""
    token = st.integers(0, 7)
    pads, prompt = draw(st.integers(0, 3)), draw(st.lists(token, min_size=1, max_size=6))
    generated = draw(st.lists(token, max_size=8))
    nodes = draw(st.lists(token, min_size=1, max_size=9))
    parents = [0] + [draw(st.integers(0, node - 1)) for node in range(1, len(nodes))]
    text = RowText(torch.tensor([7] * pads + prompt + generated), pads, pads + len(prompt), generated, {})
    return text, torch.tensor([nodes]), torch.tensor([parents])


def path(node, parents):
    return [*path(parents[node], parents), node] if node else [0]


@given(texts_with_trees(), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.5, 2))
def test_every_node_is_penalised_as_its_path_would_be_alone(given, presence, frequency, penalty):
    text, tokens, parents = given
    scores = torch.randn(tokens.shape[1], 8, generator=torch.Generator().manual_seed(0))
    paths = NodePaths(NodePrefixes(tokens, tree_tensors(parents, tokens.shape[1] - 1)), 0)
    occurred = OccurrencePenalty(presence, frequency)(scores, text, paths)
    repeated = RepetitionPenalty(penalty)(scores, text, paths)
    naive = RepetitionPenaltyLogitsProcessor(penalty)
    for node in range(tokens.shape[1]):
        tail = [tokens[0, place].item() for place in path(node, parents[0].tolist())]
        generated = text.generated + tail
        for token in range(8):
            count = generated.count(token)
            wanted = scores[node, token] - torch.tensor(count) * frequency - (presence if count else 0)
            assert torch.isclose(occurred[node, token], wanted, atol=1e-5)
        ids = torch.cat([text.tokens[text.pads :], torch.tensor(tail)])[None]
        assert torch.equal(repeated[node], naive(ids, scores[node, None])[0])
        # Alone, as in plain decoding: bit by bit the same.
        longer = RowText(torch.cat([text.tokens, torch.tensor(tail)]), text.pads, text.prompt, generated, {})
        assert torch.equal(occurred[node], OccurrencePenalty(presence, frequency)(scores[node, None], longer, None)[0])
        assert torch.equal(repeated[node], RepetitionPenalty(penalty)(scores[node, None], longer, None)[0])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("sampling", [{}, dict(do_sample=True, temperature=0.5, seed=5)])
def test_a_tree_gives_what_plain_decoding_gives_in_ragged_batches(tiny_model, settings, sampling):
    ids, mask = left_padded([random_prompt(9), random_prompt(4, seed=1), random_prompt(6, seed=2)])
    outputs = [
        tiny_model.generate(ids, mask, max_new_tokens=NEW, tree=tree, **settings, **sampling)[:, 9:].tolist()
        for tree in (MedusaTree([]), random_tree(0, 20), DynamicTree(12, 3), DynamicTree(12, 2, copied=4))
    ]
    assert all(output == outputs[0] for output in outputs)
    assert outputs[0] != tiny_model.generate(ids, mask, max_new_tokens=NEW, **sampling)[:, 9:].tolist()


def test_rows_of_a_batch_are_penalised_as_alone(tiny_model):
    prompts = [random_prompt(9), random_prompt(4, seed=1)]
    ids, mask = left_padded(prompts)
    together = tiny_model.generate(ids, mask, max_new_tokens=NEW, frequency_penalty=0.9)[:, 9:].tolist()
    alone = [tiny_model.generate(prompt, max_new_tokens=NEW, frequency_penalty=0.9)[0, prompt.shape[1] :] for prompt in prompts]
    assert together == [row.tolist() for row in alone]


def test_repetition_penalty_is_transformers_own(tiny_model):
    prompt = random_prompt(9)
    wanted = plain_greedy(tiny_model.backbone, prompt, NEW, repetition_penalty=1.4)
    assert tiny_model.generate(prompt, max_new_tokens=NEW, repetition_penalty=1.4)[0, 9:].tolist() == wanted


def test_presence_penalty_does_not_count_the_prompt(tiny_model):
    prompt = torch.arange(VOCAB)[None]  # every token has occurred, in the prompt
    plain = tiny_model.generate(prompt, max_new_tokens=1)
    assert torch.equal(tiny_model.generate(prompt, max_new_tokens=1, presence_penalty=100.0), plain)
    output = tiny_model.generate(prompt, max_new_tokens=NEW, presence_penalty=100.0)[0, VOCAB:].tolist()
    assert len(set(output)) == NEW


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", True])
def test_penalty_that_is_no_number_is_refused(tiny_model, value):
    with pytest.raises(InvalidInput, match=r"^presence_penalty is"):
        tiny_model.generate(random_prompt(9), max_new_tokens=4, presence_penalty=value)
    with pytest.raises(InvalidInput, match=r"^frequency_penalty is"):
        tiny_model.generate(random_prompt(9), max_new_tokens=4, frequency_penalty=value)
