"""Losses of the heads, with memory for one chunk of one head's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100


@dataclass(frozen=True)
class Targets:
    """What is to be said at each of n positions: m tokens with weights that sum to 1.

    A hard label is one token of weight 1; a soft one is the backbone's own distribution, cut to its m likeliest tokens.
    """

    tokens: Tensor  # (n, m) long
    weights: Tensor  # (n, m) float32


def hard_targets(
    labels: Tensor,  # (n,) long
) -> Targets:
    return Targets(labels[:, None], torch.ones(len(labels), 1, device=labels.device))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum_n sum_m -w log softmax(x W^T + b): the gradients are made chunk by chunk in the forward pass, since each needs
    the logits that would otherwise have to be kept or made again."""

    @staticmethod
    def forward(ctx, states, weight, bias, tokens, weights, chunk, compute):
        total = torch.zeros((), device=states.device)
        grad_states = torch.empty_like(states)
        needs_weight, needs_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        matrix = weight.to(compute)
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            x = states[part].to(compute)
            logits = (x @ matrix.T).float()
            if bias is not None:
                logits += bias.float()
            log_z = logits.logsumexp(-1, keepdim=True)
            w = weights[part]
            total += (w * (log_z - logits.gather(1, tokens[part]))).sum()
            # d loss / d logits = softmax * sum(w) - w, made in place of the logits
            gradient = logits.sub_(log_z).exp_().mul_(w.sum(-1, keepdim=True))
            gradient.scatter_add_(1, tokens[part], -w)
            if needs_bias:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(compute)
            grad_states[part] = (gradient @ matrix).to(states.dtype)
            if needs_weight:
                grad_weight += gradient.T @ x
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        return total

    @staticmethod
    def backward(ctx, scale):
        grad_states, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        # In place: a copy of an LM head's gradient is gigabytes. A second pass through the same graph is an error of torch's.
        return (
            grad_states.mul_(scale),
            None if grad_weight is None else grad_weight.mul_(scale).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(scale).to(bias_dtype),
            None,
            None,
            None,
            None,
        )


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
    if type(lm_head) is torch.nn.Linear:
        return _ChunkedCrossEntropy.apply(states, lm_head.weight, lm_head.bias, targets.tokens, targets.weights, chunk, compute)

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
    """A sum over rows, chunk by chunk; what a chunk computes is not kept but made again for the gradient.

    For losses through an LM head whose inner workings we leave to the model: an adapter on it, a cap on its logits.
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
