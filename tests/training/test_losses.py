"""Claims about the heads' losses: equal to the plain ones, in the memory of one chunk."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medusa.training.losses import IGNORED, Targets, hard_targets, linear_cross_entropy, soft_targets


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_hard_loss_and_gradients_equal_plain_cross_entropy(bias, chunk):
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 30, bias=bias)
    states = torch.randn(20, 8, requires_grad=True)
    labels = torch.randint(0, 30, (20,))
    labels[[3, 11]] = IGNORED
    got = linear_cross_entropy(states, lm_head, hard_targets(labels), chunk)
    got_gradients = torch.autograd.grad(got, [states, *lm_head.parameters()])
    wanted = F.cross_entropy(lm_head(states), labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(got, wanted)
    for a, b in zip(got_gradients, torch.autograd.grad(wanted, [states, *lm_head.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


def test_soft_loss_of_the_whole_vocabulary_equals_plain_cross_entropy_with_probabilities():
    torch.manual_seed(0)
    teacher, lm_head = nn.Linear(8, 30), nn.Linear(8, 30)
    states, counted = torch.randn(20, 8, requires_grad=True), torch.rand(20) > 0.3
    with torch.no_grad():
        p = teacher(states).softmax(-1)
    targets = soft_targets(states.detach(), teacher, counted, top=30, chunk=6)
    got = linear_cross_entropy(states, lm_head, targets, 6)
    wanted = F.cross_entropy(lm_head(states), p, reduction="none")[counted].sum()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, lm_head.weight)[0],
        torch.autograd.grad(wanted, lm_head.weight)[0],
        atol=1e-5,
        rtol=1e-5,
    )


def test_soft_targets_keep_the_likeliest_tokens_and_sum_to_one():
    teacher = nn.Linear(8, 30)
    targets = soft_targets(torch.randn(5, 8), teacher, torch.tensor([True] * 4 + [False]), top=4)
    assert targets.tokens.shape == (5, 4)
    torch.testing.assert_close(targets.weights.sum(-1), torch.tensor([1.0, 1, 1, 1, 0]))


def test_no_more_than_a_chunk_of_logits_is_held(monkeypatch):
    rows = []
    original = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda self, *a, **k: rows.append(len(self)) or original(self, *a, **k))
    lm_head = nn.Linear(4, 50)
    loss = linear_cross_entropy(
        torch.randn(64, 4, requires_grad=True),
        lm_head,
        Targets(torch.zeros(64, 1, dtype=torch.long), torch.ones(64, 1)),
        16,
    )
    loss.backward()
    assert rows == [16] * 4


def test_gradient_is_scaled_by_what_follows():
    lm_head = nn.Linear(4, 10)
    states = torch.randn(6, 4, requires_grad=True)
    targets = hard_targets(torch.arange(6))
    once = torch.autograd.grad(linear_cross_entropy(states, lm_head, targets), lm_head.weight)[0]
    thrice = torch.autograd.grad(3 * linear_cross_entropy(states, lm_head, targets), lm_head.weight)[0]
    torch.testing.assert_close(3 * once, thrice)
