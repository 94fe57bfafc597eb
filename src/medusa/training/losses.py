"""Losses of the heads, with memory for one chunk of one head's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medusa.placement import is_offloaded

IGNORED = -100
LARGE = 1 << 25  # number of weights of an LM head above which gradients are made one head at a time: 128 MiB


@dataclass(frozen=True)
class Targets:
    """The targets at each of n positions: m tokens with weights that sum to 1.

    A hard label is one token of weight 1; a soft one is the backbone's own distribution, cut to its m likeliest tokens.
    """

    tokens: Tensor  # (n, m) long
    weights: Tensor  # (n, m) float32


def hard_targets(
    labels: Tensor,  # (n,) long; negative where there is no target
) -> Targets:
    return Targets(labels[:, None].clamp(min=0), (labels[:, None] >= 0).float())


def _loss_and_gradients(
    states: Tensor,  # (n, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    tokens: Tensor,  # (n, m) long
    weights: Tensor,  # (n, m) float32
    chunk: int,
    compute: torch.dtype,
    wanted: tuple[bool, bool, bool],  # which of the gradients of states, weight and bias
) -> tuple[Tensor, list[Tensor | None]]:
    """sum_n sum_m -w log softmax(x W^T + b) and its gradients, from one chunk of logits after another."""
    total = torch.zeros((), device=states.device)
    of_states = torch.empty_like(states) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None
    matrix = weight.to(compute)
    for start in range(0, len(states), chunk):
        part = slice(start, start + chunk)
        x, w = states[part].to(compute), weights[part]
        logits = (x @ matrix.T).float()
        if bias is not None:
            logits += bias.float()
        log_p = logits.log_softmax(-1)  # in one pass, where logsumexp takes several
        del logits
        total -= (w * log_p.gather(1, tokens[part])).sum()
        if not any(wanted):
            continue
        # d loss / d logits = softmax * sum(w) - w, made in place of the log-probabilities
        gradient = log_p.exp_().mul_(w.sum(-1, keepdim=True))
        gradient.scatter_add_(1, tokens[part], -w)
        if of_bias is not None:
            of_bias += gradient.sum(0)
        gradient = gradient.to(compute)
        if of_states is not None:
            of_states[part] = (gradient @ matrix).to(states.dtype)
        if of_weight is not None:
            of_weight += gradient.T @ x
    return total, [of_states, of_weight, of_bias]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, since both need the logits, which would otherwise be kept or recomputed.

    In an accumulated step, every batch but the first finds the LM head's gradient already allocated; its own would need another
    V·d per head, for all heads at once. Large ones are therefore computed in the backward pass, one head after another.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, tokens, weights, chunk, compute):
        inputs = (states, weight, bias, tokens, weights)
        wanted = ctx.needs_input_grad[:3]
        again = wanted[1] and weight.numel() >= LARGE and weight.grad is not None
        ctx.later = (chunk, compute, wanted) if again else None
        total, gradients = _loss_and_gradients(*inputs, chunk, compute, (False,) * 3 if ctx.later else wanted)
        ctx.save_for_backward(*(inputs if ctx.later else gradients))
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
        return total

    @staticmethod
    def backward(ctx, scale):
        gradients = _loss_and_gradients(*ctx.saved_tensors, *ctx.later)[1] if ctx.later else ctx.saved_tensors
        # In place: a copy of an LM head's gradient is gigabytes. torch refuses a second pass through the same graph.
        scaled = [None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (*scaled, None, None, None, None)


def linear_cross_entropy(
    states: Tensor,  # (n, d)
    lm_head: torch.nn.Module,  # d -> V
    targets: Targets,
    chunk: int = 1024,
    compute: torch.dtype = torch.float32,
) -> Tensor:  # () float32
    """The summed cross-entropy of an LM head's predictions against targets, holding `chunk` rows of logits at a time.

    Args:
        compute: dtype of the matrix products; softmax, loss and accumulation are float32 in any case.
    """
    if type(lm_head) is torch.nn.Linear and not is_offloaded(lm_head):
        inputs: list[Tensor | None] = [states, lm_head.weight, lm_head.bias]
        if not torch.is_grad_enabled():  # inside the function this cannot be seen
            inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
        return _ChunkedCrossEntropy.apply(*inputs, targets.tokens, targets.weights, chunk, compute)

    def loss(states: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        log_p = lm_head(states.to(compute)).float().log_softmax(-1)
        return -(weights * log_p.gather(1, tokens)).sum()

    return in_chunks(loss, states, targets.tokens, targets.weights, chunk=chunk)


@torch.no_grad()
def soft_targets(
    states: Tensor,  # (n, d): the backbone's hidden states
    logits_of: Callable[[Tensor], Tensor],  # (n, d) -> (n, V), the backbone's own logits
    top: int,
    chunk: int = 1024,
) -> Targets:
    """The backbone's own distribution after each state, cut to the `top` likeliest tokens and normalised again."""
    tokens, weights = [], []
    for part in states.split(chunk):
        logits = logits_of(part).float()
        best = logits.topk(min(top, logits.shape[-1]), dim=-1)
        tokens.append(best.indices)
        weights.append(best.values.softmax(-1))
    return Targets(torch.cat(tokens), torch.cat(weights))


def in_chunks(
    loss: Callable[..., Tensor],  # (chunk, ...), … -> (): a sum over its rows
    *tensors: Tensor,  # each (n, ...)
    chunk: int = 1024,
) -> Tensor:  # () float32
    """A sum over rows, chunk by chunk; a chunk is computed again for the gradient, not kept.

    For losses through an LM head with an adapter on it or a cap on its logits.
    """
    total = torch.zeros((), device=tensors[0].device)
    for parts in zip(*(tensor.split(chunk) for tensor in tensors), strict=True):
        total = total + checkpoint(loss, *parts, use_reentrant=False)
    return total


def cross_entropy(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,) long
) -> Tensor:
    """-sum log p(label), in float32."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def kl_divergence(
    logits: Tensor,  # (n, V)
    teacher: Tensor,  # (n, V): logits too
) -> Tensor:
    """sum KL(p_teacher || p), in float32 (paper 2.3.2)."""
    log_p = logits.float().log_softmax(-1)
    return F.kl_div(log_p, teacher.float().log_softmax(-1), reduction="sum", log_target=True)
