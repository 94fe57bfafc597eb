"""Claims about the heads' losses: equal to the plain ones, in the memory of one chunk."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medusa.heads import DraftLMHead
from medusa.training import losses
from medusa.training.losses import Targets, Teacher, hard_targets, lm_head_loss, soft_targets


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_hard_loss_and_gradients_equal_plain_cross_entropy(bias, chunk):
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 30, bias=bias)
    states = torch.randn(20, 8, requires_grad=True)
    labels = torch.randint(0, 30, (20,))
    got = lm_head_loss(states, lm_head, hard_targets(labels), chunk)
    got_gradients = torch.autograd.grad(got, [states, *lm_head.parameters()])
    wanted = F.cross_entropy(lm_head(states), labels, reduction="sum")
    torch.testing.assert_close(got, wanted)
    for a, b in zip(got_gradients, torch.autograd.grad(wanted, [states, *lm_head.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


def test_soft_loss_of_the_whole_vocabulary_equals_plain_cross_entropy_with_probabilities():
    torch.manual_seed(0)
    teacher, lm_head = nn.Linear(8, 30), nn.Linear(8, 30)
    states = torch.randn(20, 8, requires_grad=True)
    with torch.no_grad():
        p = teacher(states).softmax(-1)
    targets = soft_targets(states.detach(), teacher, top=30, chunk=6)
    got = lm_head_loss(states, lm_head, targets, 6)
    wanted = F.cross_entropy(lm_head(states), p, reduction="sum")
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, lm_head.weight)[0],
        torch.autograd.grad(wanted, lm_head.weight)[0],
        atol=1e-5,
        rtol=1e-5,
    )


def test_soft_targets_keep_the_likeliest_tokens_and_sum_to_one():
    teacher = nn.Linear(8, 30)
    targets = soft_targets(torch.randn(5, 8), teacher, top=4)
    assert targets.tokens.shape == (5, 4)
    torch.testing.assert_close(targets.weights.sum(-1), torch.ones(5))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_large_gradients_of_accumulated_batches_are_made_one_head_at_a_time_and_are_the_same(compute, monkeypatch):
    monkeypatch.setattr(losses, "LARGE", 200)
    torch.manual_seed(0)
    targets, inputs = hard_targets(torch.arange(64) % 50), torch.randn(64, 4)
    heads = [nn.Linear(4, 50), nn.Linear(4, 50)]
    totals, gradients, kept = [], [], []
    for accumulated in (False, True):
        states = inputs.clone().requires_grad_(True)
        for parameter in (p for head in heads for p in head.parameters()):
            parameter.grad = torch.zeros_like(parameter) if accumulated else None  # as a batch before leaves it
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            loss = sum(3 * lm_head_loss(states, head, targets, 16, compute) for head in heads)
        loss.backward()
        totals.append(loss.detach())
        gradients.append([states.grad, *(p.grad.clone() for head in heads for p in head.parameters())])
        kept.append(sum(t.shape == (50, 4) and all(t is not head.weight for head in heads) for t in saved))
    assert kept == [2, 0]
    torch.testing.assert_close(totals[0], totals[1])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_where_no_gradient_is_asked_for_none_is_made(monkeypatch):
    products = []
    original = torch.Tensor.scatter_add_
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda self, *a: products.append(1) or original(self, *a))
    states, lm_head, targets = torch.randn(6, 4), nn.Linear(4, 10), hard_targets(torch.arange(6))
    with torch.no_grad():
        without = lm_head_loss(states, lm_head, targets)
    assert not products
    torch.testing.assert_close(without, lm_head_loss(states, lm_head, targets).detach())
    assert products


def test_gradient_is_scaled_by_what_follows():
    lm_head = nn.Linear(4, 10)
    states = torch.randn(6, 4, requires_grad=True)
    targets = hard_targets(torch.arange(6))
    once = torch.autograd.grad(lm_head_loss(states, lm_head, targets), lm_head.weight)[0]
    thrice = torch.autograd.grad(3 * lm_head_loss(states, lm_head, targets), lm_head.weight)[0]
    torch.testing.assert_close(3 * once, thrice)


class Capped(nn.Linear):
    """An LM head that is more than a matrix."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


def test_an_lm_head_that_is_more_than_a_matrix_is_asked_itself():
    torch.manual_seed(0)
    lm_head, states = Capped(8, 30), torch.randn(20, 8, requires_grad=True)
    labels = torch.randint(0, 30, (20,))
    got = lm_head_loss(states, lm_head, hard_targets(labels), 6)
    wanted = F.cross_entropy(lm_head(states), labels, reduction="sum")
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, states)[0], torch.autograd.grad(wanted, states)[0])


@pytest.mark.parametrize("lm_head", [nn.Linear(8, 30), Capped(8, 30)])
def test_a_teachers_loss_is_the_kl_divergence_and_its_gradient(lm_head):
    torch.manual_seed(0)
    teacher, states = nn.Linear(8, 30), torch.randn(20, 8, requires_grad=True)
    got = lm_head_loss(states, lm_head, Teacher(states.detach(), teacher), chunk=6)
    p = teacher(states).softmax(-1).detach()
    wanted = (p * (p.log() - lm_head(states).log_softmax(-1))).sum()
    torch.testing.assert_close(got, wanted)
    inputs = [states, lm_head.weight]
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert lm_head_loss(states, teacher, Teacher(states.detach(), teacher)).abs() < 1e-5


def adapted_lm_head(bias: bool, more_adapters: tuple[str, ...] = (), **options) -> nn.Module:
    """An LM head of 30 tokens with a LoRA, as if trained."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    module = nn.ModuleDict({"lm_head": nn.Linear(8, 30, bias=bias)}).requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False, **options)
    for name in ("default", *more_adapters):
        peft.inject_adapter_in_model(config, module, name)
    module["lm_head"].set_adapter(["default", *more_adapters])
    return module["lm_head"]


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3, 4, 11, 29])])
@pytest.mark.parametrize("kind", ["hard", "soft", "teacher"])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_through_a_lora_equal_autograds_in_float64(bias, kind, rows):
    lm_head = adapted_lm_head(bias)
    states, teacher = torch.randn(20, 8, requires_grad=True), nn.Linear(8, 30 if rows is None else len(rows))
    p = teacher(states).softmax(-1).detach()
    targets: Targets | Teacher = Teacher(states.detach(), teacher)
    if kind == "hard":
        targets = hard_targets(p.argmax(-1))
        p = F.one_hot(p.argmax(-1), p.shape[1])
    elif kind == "soft":
        targets = soft_targets(states.detach(), teacher, top=3)
        p = torch.zeros_like(p).scatter(1, targets.tokens, targets.weights)
    got = lm_head_loss(states, lm_head if rows is None else DraftLMHead(lm_head, rows), targets, chunk=6)
    inputs = [states, lm_head.lora_A["default"].weight, lm_head.lora_B["default"].weight]
    got_gradients = torch.autograd.grad(3 * got, inputs)

    x, down, up = (tensor.detach().double().requires_grad_(True) for tensor in inputs)
    logits = (
        F.linear(x, lm_head.weight.double(), None if lm_head.bias is None else lm_head.bias.double()) + x @ down.T @ up.T * 1.5
    )
    log_p = (logits if rows is None else logits[:, rows]).log_softmax(-1)
    wanted = (torch.special.entr(p.double()).sum() if kind == "teacher" else 0) * -1 - (p * log_p).sum()
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-6)
    for a, b in zip(got_gradients, torch.autograd.grad(3 * wanted, [x, down, up]), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_no_more_than_a_chunk_of_logits_is_held_and_each_is_computed_once(adapted, monkeypatch):
    rows = []
    original = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda self, *a, **k: rows.append(len(self)) or original(self, *a, **k))
    lm_head = adapted_lm_head(False) if adapted else nn.Linear(8, 30)
    loss = lm_head_loss(
        torch.randn(64, 8, requires_grad=True),
        lm_head,
        Targets(torch.zeros(64, 1, dtype=torch.long), torch.ones(64, 1)),
        16,
    )
    loss.backward()
    assert rows == [16] * 4


def test_dropout_before_a_lora_is_that_of_the_layer():
    lm_head, states = adapted_lm_head(False, lora_dropout=0.5).train(), torch.randn(20, 8)
    targets = hard_targets(torch.arange(20))
    torch.manual_seed(1)
    got = lm_head_loss(states, lm_head, targets)
    torch.manual_seed(1)
    torch.testing.assert_close(got, F.cross_entropy(lm_head(states), torch.arange(20), reduction="sum"))
    assert not torch.allclose(got, lm_head_loss(states, lm_head.eval(), targets))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"more_adapters": ("second",)}])
def test_adapters_that_are_more_than_a_lora_are_asked_themselves(options):
    lm_head, states = adapted_lm_head(True, **options), torch.randn(20, 8, requires_grad=True)
    labels = torch.arange(20)
    got = lm_head_loss(states, lm_head, hard_targets(labels), 6)
    wanted = F.cross_entropy(lm_head(states), labels, reduction="sum")
    torch.testing.assert_close(got, wanted)
    inputs = [states, *(p for p in lm_head.parameters() if p.requires_grad)]
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lm_head", [nn.Linear(4, 50), Capped(4, 50)])
def test_a_chunk_at_a_time_is_kept_of_what_a_loss_computes(lm_head):
    states, kept = torch.randn(64, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = lm_head_loss(states, lm_head, Teacher(states.detach(), nn.Linear(4, 50)), chunk=16)
    assert not any(shape[-1:] == (50,) and len(shape) == 2 and shape != (50, 4) for shape in kept)
    loss.backward()
    assert states.grad is not None and lm_head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_in_low_precision_is_close_to_float32(dtype):
    torch.manual_seed(0)
    lm_head, states = nn.Linear(64, 500), torch.randn(256, 64)
    labels = torch.randint(0, 500, (256,))
    got = lm_head_loss(states, lm_head, hard_targets(labels), 50, compute=dtype)
    wanted = F.cross_entropy(lm_head(states), labels, reduction="sum")
    assert got.dtype == torch.float32 and abs(got / wanted - 1) < 1e-3
