"""The objective: Eq. 1 for the heads and, if the backbone is trained too, Eq. 2 (paper 2.2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from medusa.checkpoints.adapter import without_adapter
from medusa.heads import MedusaHeads, tokens_read
from medusa.kernels.quantized import shared_map
from medusa.metrics import predicted
from medusa.model import MedusaModel
from medusa.runs.files import digest
from medusa.training.config import TrainingConfig
from medusa.training.losses import (
    IGNORED,
    Targets,
    Teacher,
    hard_targets,
    lm_head_loss,
    soft_targets,
)

ROOT_ALONE = 0.25  # share of training positions at which a path head reads the root alone
MOST_LOGITS = 1 << 26  # in one chunk: 256 MiB in float32


def count_asked(
    labels: Tensor,  # (B, T) long
    segments: Tensor,  # (B, T) long
    num_heads: int,
) -> Tensor:  # (1 + K,) long
    """The number of tokens that the LM head, then each head, has to predict in a batch."""
    return torch.stack([predicted(labels != IGNORED, segments, shift).sum() for shift in range(1, num_heads + 2)])


class Objective(nn.Module):
    """The losses of the heads and of the backbone, as the one module that is trained.

    Args:
        model: the backbone; its parameters that require a gradient are trained.
        heads: in float32.
    """

    def __init__(self, model: MedusaModel, heads: MedusaHeads, config: TrainingConfig):
        super().__init__()
        self.heads = heads
        self.backbone = model.backbone
        self._no_split_modules = model.backbone._no_split_modules  # what FSDP shards as a piece
        self._model = (model,)  # in a tuple, so that it is not a submodule
        self.recipe = config
        self.compute = next(model.backbone.parameters()).dtype
        if not self.compute.is_floating_point:  # quantised
            self.compute = model.backbone.dtype
        self.chunk = config.loss_chunk or max(1, min(1024, MOST_LOGITS // model.vocab_size))
        self.lambda_0 = config.lambda_0 if config.joint else 1.0  # a schedule may change it

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        if self.recipe.backbone != "full":
            # The backbone's own dropout stays off, also because it is the teacher when its adapter is off.
            self.backbone.eval()
            for name, module in self.backbone.named_modules():
                if name.endswith("lora_dropout"):
                    module.train(mode)
        return self

    def forward(
        self,
        input_ids: Tensor,  # (B, T) long
        labels: Tensor,  # (B, T) long, IGNORED where a token is not to be learnt
        segments: Tensor,  # (B, T) long: the text each token belongs to, numbered from 1; 0 is padding
        hidden: Tensor | None = None,  # (B, T, d): stored hidden states of the backbone, without its adapter
        counts: Tensor | None = None,  # (1 + K,): divisors of the losses; None: `count_asked` of this batch
        rows: Tensor | None = None,  # (B,) long: which rows of the data these are
        step: int = 0,  # of the training
    ) -> dict[str, Tensor]:
        """The `loss`, each head's mean cross-entropy `head_losses` (K,), `lm_loss` of Eq. 2, and the `hidden` states."""
        model, config = self._model[0], self.recipe
        if counts is None:
            counts = count_asked(labels, segments, len(self.heads))
        counts = counts.clamp(min=1)
        packed = segments if bool((segments > 1).any()) else None
        distill = config.joint and config.lm_loss == "distill"
        original = hidden
        if config.joint or hidden is None:
            with torch.set_grad_enabled(config.joint and torch.is_grad_enabled()):
                hidden = model.hidden_states(input_ids, packed)
        if not distill:
            original = hidden.detach()
        elif original is None:
            with torch.no_grad(), without_adapter(self.backbone):
                original = model.hidden_states(input_ids, packed)
        following = predicted(labels != IGNORED, segments, 1)  # positions whose next token counts
        original = original[:, :-1][following]

        # Medusa 2.2.1, Eq. 1
        seen = self._paths_seen(input_ids, rows, step) if self.training and self.heads.kind == "path" else None
        head_losses = self._head_losses(input_ids, seen, hidden, labels, segments, following, original, distill) / counts[1:]
        loss = (head_losses.new_tensor(config.lambdas(len(self.heads))) * head_losses).sum()
        output = {"head_losses": head_losses.detach(), "hidden": hidden.detach()}
        if config.joint:
            targets = hard_targets(labels[:, 1:][following]) if not distill else Teacher(original, self._original_logits)
            lm_loss = lm_head_loss(hidden[:, :-1][following], model.lm.logits_of, targets, self.chunk, self.compute)
            lm_loss = lm_loss / counts[0]
            output["lm_loss"] = lm_loss.detach()
            loss = lm_loss + self.lambda_0 * loss  # Medusa 2.2.2, Eq. 2
        return output | {"loss": loss}

    def _head_losses(
        self,
        input_ids: Tensor,  # (B, T) long
        seen: Tensor | None,  # (B, T, K) bool: where heads read the path, not the root alone; None: everywhere
        hidden: Tensor,  # (B, T, d)
        labels: Tensor,
        segments: Tensor,
        following: Tensor,  # (B, T - 1) bool: positions whose next token counts, n of them
        original: Tensor,  # (n, d): the hidden states there, for soft targets
        distill: bool,
    ) -> Tensor:  # (K,) float32, summed over positions
        soft = None
        if self.recipe.targets == "soft":
            soft = self._soft_targets(original, distill)
            place = following.flatten().cumsum(0).view_as(following) - 1  # of a position in `soft`
        embedded = self.heads.embed(input_ids) if self.heads.kind != "medusa" else None
        losses = []
        for k in range(len(self.heads)):
            # Head k + 1 at position t predicts token t + k + 2, as the backbone does at t + k + 1.
            shift = k + 2
            row, t = predicted(labels != IGNORED, segments, shift).nonzero(as_tuple=True)  # a GPU is waited for once
            if soft is None:
                targets = hard_targets(self.heads.places(labels[row, t + shift]))
            else:
                at = place[row, t + k + 1]
                targets = Targets(soft.tokens[at], soft.weights[at])
            states = hidden[row, t].to(self.heads.dtype)
            known = None if embedded is None else self._known(embedded, seen, row, t, k)
            with torch.autocast(states.device.type, self.compute, enabled=self.compute != torch.float32):
                states = self.heads.state(states, k, known)
            losses.append(lm_head_loss(states, self.heads.lm_head(k), targets, self.chunk, self.compute))
        return torch.stack(losses)

    def _paths_seen(
        self,
        input_ids: Tensor,  # (B, T) long
        rows: Tensor | None,  # (B,) long
        step: int,
    ) -> Tensor:  # (B, T, K) bool
        """Where heads read the path, not the root alone, as they do when they propose a shortlist.

        The seed, the step and the row decide, so that it does not matter which process has the row, nor after what.
        """
        (b, t), draws = input_ids.shape, torch.Generator()
        numbers = range(b) if rows is None else rows.tolist()
        drawn = [
            torch.rand(t, len(self.heads), generator=draws.manual_seed(int(digest([self.recipe.seed, step, number])[:12], 16)))
            for number in numbers
        ]
        return torch.stack(drawn).to(input_ids.device) >= ROOT_ALONE

    def _known(
        self,
        embedded: Tensor,  # (B, T, E)
        seen: Tensor | None,  # (B, T, K) bool
        row: Tensor,  # (n,) long
        t: Tensor,  # (n,) long: the positions, in their rows
        k: int,
    ) -> Tensor:  # (n, m E)
        """The embeddings that head k + 1 reads at each position: of the root, the token after it, then of the path."""
        read = [embedded[row, t + 1 + j] for j in range(tokens_read(self.heads.kind, k))]
        if seen is not None:
            there = seen[row, t, k][:, None]
            read[1:] = [part * there for part in read[1:]]
        return torch.cat(read, -1)

    def _soft_targets(self, original: Tensor, distill: bool) -> Targets:
        """The backbone's distribution over the tokens that heads score."""
        heads, model = self.heads, self._model[0]
        logits_of: Callable[[Tensor], Tensor] = model.logits
        if heads.config.medusa_draft_vocabulary is not None:
            lm_head = shared_map(self.backbone.get_output_embeddings())
            if distill:  # not its adapter, so that only these rows are computed
                rows = heads.rows_of(getattr(lm_head, "base_layer", lm_head))
            else:
                rows = heads.lm_head(0) if heads.config.medusa_shared_lm_head else heads.rows_of(lm_head)
            logits_of = functools.partial(model.logits, lm_head=rows)
        with without_adapter(self.backbone) if distill else nullcontext():
            return soft_targets(original, logits_of, self.recipe.soft_top, self.chunk)

    def _original_logits(self, original: Tensor) -> Tensor:
        """The logits of the backbone without its adapter."""
        with without_adapter(self.backbone):
            return self._model[0].logits(original)
