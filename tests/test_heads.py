"""Claims about Medusa heads."""

import pytest
import torch
from torch import nn

from medusa import MedusaHeads, MedusaModel, MedusaTree
from medusa.errors import CheckpointError
from tiny import VOCAB, tiny_backbone


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_untrained_head_says_what_the_lm_head_says(shared, num_layers):
    lm_head = nn.Linear(16, 32)
    heads = MedusaHeads.for_lm_head(lm_head, 3, num_layers, shared)
    h = torch.randn(2, 5, 16)
    logits = heads(h)
    assert logits.shape == (3, 2, 5, 32)
    for k in range(3):
        torch.testing.assert_close(logits[k], lm_head(h))


def test_head_is_the_papers_formula():
    heads = MedusaHeads(8, 16, 1)
    nn.init.normal_(heads[0][0].linear.weight)
    nn.init.normal_(heads[0][0].linear.bias)
    h = torch.randn(4, 8)
    w1, b1, w2 = heads[0][0].linear.weight, heads[0][0].linear.bias, heads[0][1].weight
    inner = h @ w1.T + b1
    torch.testing.assert_close(heads(h)[0], (h + inner * torch.sigmoid(inner)) @ w2.T)


def test_layers_of_a_head_are_distinct_blocks():
    heads = MedusaHeads(8, 16, 1, num_layers=2)
    assert heads[0][0].linear.weight is not heads[0][1].linear.weight


def test_only_the_heads_asked_for_run():
    heads = MedusaHeads(8, 16, 5)
    heads[4][0].linear.weight.data.fill_(torch.nan)
    logits = heads(torch.randn(1, 8), num_heads=4)
    assert logits.shape == (4, 1, 16) and not logits.isnan().any()


def test_parameters_have_the_names_of_the_v01_format():
    assert set(MedusaHeads(8, 16, 2, num_layers=2).state_dict()) == {
        f"{k}.{name}"
        for k in range(2)
        for name in ("0.linear.weight", "0.linear.bias", "1.linear.weight", "1.linear.bias", "2.weight")
    }


@pytest.mark.parametrize(("hidden", "vocab"), [(32, VOCAB), (64, VOCAB + 1)])
def test_heads_of_another_size_are_refused_by_the_model(hidden, vocab):
    with pytest.raises(CheckpointError, match="use heads trained on this backbone"):
        MedusaModel(tiny_backbone(), MedusaHeads(hidden, vocab, 1), MedusaTree([(0,)]))
