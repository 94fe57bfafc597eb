"""Losses of the heads, with memory for one chunk of one head's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medusa.checkpoints.adapter import plain_lora
from medusa.heads import DraftLMHead
from medusa.placement import is_offloaded

IGNORED = -100
LARGE = 1 << 25  # number of weights of an LM head above which gradients are made one head at a time: 128 MiB


@dataclass(frozen=True)
class Targets:
    """The targets at each of n positions: m tokens with weights that sum to 1. Their loss is the cross-entropy.

    A hard label is one token of weight 1; a soft one is the backbone's own distribution, cut to its m likeliest tokens.
    """

    tokens: Tensor  # (n, m) long
    weights: Tensor  # (n, m) float32

    def loss(
        self,
        log_p: Tensor,  # (chunk, V) float32
        part: slice,  # these positions
    ) -> Tensor:  # ()
        return -(self.weights[part] * log_p.gather(1, self.tokens[part])).sum()

    def loss_and_gradient_(self, log_p: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to the logits, made in place of the log-probabilities."""
        loss, w = self.loss(log_p, part), self.weights[part]
        # d loss / d logits = softmax * sum(w) - w
        return loss, log_p.exp_().mul_(w.sum(-1, keepdim=True)).scatter_add_(1, self.tokens[part], -w)


@dataclass(frozen=True)
class Teacher:
    """The targets at each of n positions: a model's whole distribution. Their loss is KL(p_teacher || p) (paper 2.3.2)."""

    states: Tensor  # (n, d)
    logits_of: Callable[[Tensor], Tensor]  # (chunk, d) -> (chunk, V)

    @torch.no_grad()
    def _log_p(self, part: slice) -> Tensor:
        return self.logits_of(self.states[part]).float().log_softmax(-1)

    def loss(self, log_p: Tensor, part: slice) -> Tensor:
        return F.kl_div(log_p, self._log_p(part), reduction="sum", log_target=True)

    def loss_and_gradient_(self, log_p: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        teacher = self._log_p(part)
        p_teacher = teacher.exp()
        loss = teacher.sub_(log_p).mul_(p_teacher).sum()
        return loss, log_p.exp_().sub_(p_teacher)  # d loss / d logits = softmax - p_teacher


def hard_targets(
    labels: Tensor,  # (n,) long; negative where there is no target
) -> Targets:
    return Targets(labels[:, None].clamp(min=0), (labels[:, None] >= 0).float())


class _Product(NamedTuple):
    """Logits = states [frozen | trained]^T + bias: an LM head that is a matrix, or one with a LoRA, whose matrix is frozen."""

    states: Tensor  # (n, d); with a LoRA (n, d + r)
    trained: Tensor  # (V, d); with a LoRA (V, r)
    bias: Tensor | None  # (V,)
    frozen: Tensor | None = None  # (V, d), with a LoRA

    @classmethod
    def of(cls, states: Tensor, lm_head: object) -> _Product | None:
        """How an LM head makes logits of states; None if it is more than a matrix and a LoRA."""
        rows = None
        if isinstance(lm_head, DraftLMHead):
            rows, lm_head = lm_head.tokens, lm_head.whole
        if type(lm_head) is nn.Linear and not is_offloaded(lm_head):
            product = cls(states, lm_head.weight, lm_head.bias)
        elif isinstance(lm_head, nn.Module) and (parts := plain_lora(lm_head)) is not None:
            base, inner, outer = parts
            product = cls(torch.cat([states, inner(states)], -1), outer, base.bias, base.weight)
        else:
            return None
        if rows is None:
            return product
        return product._replace(**{k: t[rows] for k, t in product._asdict().items() if k != "states" and t is not None})


def _loss_and_gradients(
    product: _Product,
    targets: Targets | Teacher,
    chunk: int,
    compute: torch.dtype,
    wanted: tuple[bool, bool, bool],  # which of the gradients of states, trained weight and bias
) -> tuple[Tensor, list[Tensor | None]]:
    """The summed loss and its gradients, from one chunk of logits after another."""
    states, trained, bias, frozen = product
    total = torch.zeros((), device=states.device)
    of_states = torch.empty_like(states) if wanted[0] else None
    of_trained = torch.zeros_like(trained, dtype=torch.float32) if wanted[1] else None
    of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None
    matrix = trained.to(compute) if frozen is None else torch.cat([frozen.to(compute), trained.to(compute)], 1)
    for start in range(0, len(states), chunk):
        part = slice(start, start + chunk)
        x = states[part].to(compute)
        logits = (x @ matrix.T).float()
        if bias is not None:
            logits += bias.float()
        log_p = logits.log_softmax(-1)  # in one pass, where logsumexp takes several
        del logits
        if not any(wanted):
            total += targets.loss(log_p, part)
            continue
        loss, gradient = targets.loss_and_gradient_(log_p, part)
        total += loss
        if of_bias is not None:
            of_bias += gradient.sum(0)
        gradient = gradient.to(compute)
        if of_states is not None:
            of_states[part] = (gradient @ matrix).to(states.dtype)
        if of_trained is not None:
            of_trained += gradient.T @ x[:, -trained.shape[1] :]
    return total, [of_states, of_trained, of_bias]


class _ChunkedLoss(torch.autograd.Function):
    """The gradients are computed with the loss, since both need the logits, which would otherwise be kept or recomputed.

    In an accumulated step, every batch but the first finds the LM head's gradient already allocated; its own would need another
    V·d per head, for all heads at once. Large ones are therefore computed in the backward pass, one head after another.
    """

    @staticmethod
    def forward(ctx, states, trained, bias, frozen, targets, chunk, compute):
        product = _Product(states, trained, bias, frozen)
        wanted = ctx.needs_input_grad[:3]
        again = wanted[1] and trained.numel() >= LARGE and trained.grad is not None
        ctx.later = (targets, chunk, compute, wanted) if again else None
        total, gradients = _loss_and_gradients(product, targets, chunk, compute, (False,) * 3 if ctx.later else wanted)
        ctx.save_for_backward(*(product if ctx.later else gradients))
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in product[:3]]
        return total

    @staticmethod
    def backward(ctx, scale):
        saved = ctx.saved_tensors
        gradients = _loss_and_gradients(_Product(*saved), *ctx.later)[1] if ctx.later else saved
        # In place: a copy of an LM head's gradient is gigabytes. torch refuses a second pass through the same graph.
        scaled = [None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (*scaled, None, None, None, None)


def lm_head_loss(
    states: Tensor,  # (n, d)
    lm_head: Callable[[Tensor], Tensor],  # d -> V
    targets: Targets | Teacher,
    chunk: int = 1024,
    compute: torch.dtype = torch.float32,
) -> Tensor:  # () float32
    """The summed loss of an LM head's predictions against targets, holding `chunk` rows of logits at a time.

    Args:
        lm_head: if it is more than a matrix and a LoRA (another adapter, capped logits), its logits are computed twice.
        compute: dtype of the matrix products; softmax, loss and accumulation are float32 in any case.
    """
    if (product := _Product.of(states, lm_head)) is not None:
        if not torch.is_grad_enabled():  # inside the function this cannot be seen
            product = product._replace(**{k: t.detach() for k, t in product._asdict().items() if t is not None})
        return _ChunkedLoss.apply(*product, targets, chunk, compute)

    def loss(states: Tensor, part: slice) -> Tensor:
        return targets.loss(lm_head(states.to(compute)).float().log_softmax(-1), part)

    total = torch.zeros((), device=states.device)
    for start in range(0, len(states), chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(loss, states[part], part, use_reentrant=False)
    return total


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
