"""Medusa-1: heads trained on a frozen backbone (paper 2.2.1), with transformers' Trainer."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medusa.errors import InvalidInput, MedusaError
from medusa.heads import MedusaHeads, save_heads
from medusa.metrics import rank_hits
from medusa.model import MedusaModel
from medusa.training.data import collate, load_blocks
from medusa.training.losses import IGNORED, Targets, hard_targets, linear_cross_entropy, soft_targets

EVALUATED_RANKS = 5


@dataclass(frozen=True)
class TrainingConfig:
    """How heads are trained. The defaults are the paper's (appendix B) but for soft targets."""

    num_heads: int = 5  # K
    num_layers: int = 1  # residual blocks per head
    shared_lm_head: bool = False  # train the residual blocks alone, predict through the backbone's LM head
    lambda_base: float = 0.8  # lambda_k = lambda_base ** k, Eq. 1
    targets: Literal["soft", "hard"] = "soft"  # the backbone's distribution at t + k, or the token of the text
    soft_top: int = 32  # tokens of the backbone's distribution that soft targets keep
    max_steps: int = -1  # -1: as many as the epochs take
    epochs: float = 2.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 2e-3  # peak; cosine to zero after a linear warmup
    warmup_steps: int = 40
    weight_decay: float = 0.0
    max_length: int = 2048
    loss_chunk: int = 1024  # rows of logits held at a time
    logging_steps: int = 20
    eval_steps: int = 0  # 0: at the end
    save_steps: int = 500
    seed: int = 0

    def __post_init__(self):
        for name in (
            "num_heads",
            "epochs",
            "batch_size",
            "gradient_accumulation",
            "max_length",
            "loss_chunk",
            "soft_top",
        ):
            if getattr(self, name) <= 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted more than 0")
        if self.seed < 0:
            raise InvalidInput(f"seed is {self.seed}, wanted at least 0")
        if not self.learning_rate > 0:
            raise InvalidInput(f"learning_rate is {self.learning_rate}, wanted more than 0")


class Medusa1Objective(nn.Module):
    """Eq. 1 as a module whose only parameters are the heads'."""

    def __init__(self, model: MedusaModel, heads: MedusaHeads, config: TrainingConfig):
        super().__init__()
        self.heads = heads
        self._model = (model,)  # in a tuple: the frozen backbone is no part of what is trained or saved
        self.recipe = config
        self.compute = next(model.backbone.parameters()).dtype

    def forward(
        self,
        input_ids: Tensor,  # (B, T) long
        labels: Tensor,  # (B, T) long, IGNORED where a token is not to be learnt
    ) -> dict[str, Tensor]:
        """The loss and, under `head_losses`, each head's mean cross-entropy (K,)."""
        model = self._model[0]
        with torch.no_grad():
            hidden = model.hidden_states(input_ids)
        targets = self._targets(model, hidden, labels)
        width = labels.shape[1]
        losses = []
        for k in range(len(self.heads)):
            # Head k + 1 at position t says token t + k + 2: what the backbone says at t + k + 1.
            shift = k + 1
            n = width - 1 - shift
            here = Targets(targets.tokens[:, shift:].flatten(0, 1), targets.weights[:, shift:].flatten(0, 1))
            states = hidden[:, :n].flatten(0, 1).to(self.heads.dtype)
            with torch.autocast(states.device.type, self.compute, enabled=self.compute != torch.float32):
                states = self.heads.residual(states, k)
            total = linear_cross_entropy(states, self.heads.lm_head(k), here, self.recipe.loss_chunk, self.compute)
            losses.append(total / here.weights.sum().clamp(min=1))
        stacked = torch.stack(losses)
        # Medusa 2.2.1, Eq. 1: lambda_k is the k-th power of a constant
        weights = torch.tensor([self.recipe.lambda_base**k for k in range(1, len(losses) + 1)], device=stacked.device)
        return {"loss": (weights * stacked).sum(), "head_losses": stacked.detach()}

    def _targets(self, model: MedusaModel, hidden: Tensor, labels: Tensor) -> Targets:
        """What the backbone (or the text) says after each position but the last, (B, T - 1, m)."""
        following = labels[:, 1:]
        if self.recipe.targets == "hard":
            flat = hard_targets(following.flatten())
        else:
            states = hidden[:, :-1].flatten(0, 1)
            counted = (following != IGNORED).flatten()
            flat = soft_targets(states, model.logits, counted, self.recipe.soft_top, self.recipe.loss_chunk)
        shape = (*following.shape, -1)
        return Targets(flat.tokens.view(shape), flat.weights.view(shape))


class Medusa1Trainer(Trainer):
    """transformers' Trainer on the objective; evaluation is the heads' accuracy at each rank."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        objective = self.model
        num_heads = len(objective.heads)
        hits, asked = torch.zeros(num_heads, EVALUATED_RANKS, dtype=torch.long), torch.zeros(num_heads, dtype=torch.long)
        loss, batches = 0.0, 0
        for batch in self.get_eval_dataloader(eval_dataset):
            batch = self._prepare_inputs(batch)
            with torch.no_grad():
                loss += objective(**batch)["loss"].item()
                hidden = objective._model[0].hidden_states(batch["input_ids"]).to(objective.heads.dtype)
                counted = batch["labels"] != IGNORED
                got, times = rank_hits(objective.heads, hidden, batch["input_ids"], counted, EVALUATED_RANKS)
            hits, asked, batches = hits + got, asked + times, batches + 1
        accuracy = (hits / asked.clamp(min=1)[:, None]).cumsum(-1)
        metrics = {f"{metric_key_prefix}_loss": loss / max(batches, 1)}
        for k, row in enumerate(accuracy.tolist(), 1):
            metrics |= {f"{metric_key_prefix}_head{k}_top{i}": value for i, value in enumerate(row, 1)}
        self.log(metrics)
        return metrics

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        return (output["loss"], output) if return_outputs else output["loss"]


class _Progress(ProgressCallback):
    """A bar on stderr with the newest figures beside it; stdout is for results."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs:
            shown = {key: logs[key] for key in ("loss", "eval_loss", "eval_head1_top1") if key in logs}
            self.training_bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()})


class _StopOnNonsense(TrainerCallback):
    """Stop when the loss is no number: going on would only overwrite good checkpoints."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise MedusaError(f"loss is {loss} at step {state.global_step}; lower --learning-rate and resume")


def train(
    model: MedusaModel,
    tokenizer: Any,
    data: str | Path,
    output: str | Path,
    config: TrainingConfig,
    eval_data: str | Path | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train heads for a backbone and save them in `output`, which then also holds the resolved config and metrics.

    Args:
        model: the backbone; heads it has already are the starting point, else new ones are made.
        resume: go on from the newest checkpoint in `output`; without one, start.

    Raises:
        InvalidInput: data that cannot be used.
    """
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot write to {output}: {error.strerror}") from None
    backbone = model.backbone
    backbone.requires_grad_(False)
    shortest = config.num_heads + 3
    length = min(config.max_length, model.context or config.max_length)
    train_blocks = load_blocks(data, tokenizer, length, model.vocab_size, shortest)
    eval_blocks = load_blocks(eval_data, tokenizer, length, model.vocab_size, shortest) if eval_data else None

    lm_head = backbone.get_output_embeddings()
    heads = MedusaHeads.for_lm_head(lm_head, config.num_heads, config.num_layers, config.shared_lm_head)
    if model.heads is not None:
        if model.heads.state_dict().keys() != heads.state_dict().keys():
            raise InvalidInput("the heads given to start from have other sizes than the configuration asks for")
        heads.load_state_dict(model.heads.state_dict())
    heads.float()  # trained in float32, saved in the backbone's dtype
    heads.requires_grad_(True)
    objective = Medusa1Objective(model, heads, config)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=config.max_steps,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=config.logging_steps,
        eval_strategy="steps" if eval_blocks and config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        report_to="none",
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
    )
    trainer = Medusa1Trainer(
        model=objective,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=collate,
        callbacks=[_StopOnNonsense()],
    )
    for callback in (ProgressCallback, PrinterCallback):  # both write to stdout
        trainer.remove_callback(callback)
    trainer.add_callback(_Progress())
    checkpoint = get_last_checkpoint(str(output)) if resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if eval_blocks else {}
    heads.to(backbone.dtype)
    save_heads(heads, output, base_model=backbone.config._name_or_path or None)
    record = {"config": dataclasses.asdict(config), "metrics": metrics, "log": trainer.state.log_history}
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return metrics
