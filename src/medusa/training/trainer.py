"""The trainer: transformers' Trainer, extended for heads."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa.errors import CheckpointError, MedusaError
from medusa.metrics import accuracies_of, expected_acceptance_length, rank_hits
from medusa.training.data import FILLER, EpochOrder
from medusa.training.losses import IGNORED
from medusa.training.objective import Objective, count_asked
from medusa.trees.search import search_tree
from medusa.trees.static import MedusaTree

EVALUATED_RANKS = 10
SHOWN_RANKS = 5
EXPLODED = 4.0  # in multiples of the loss of a uniform guess


@dataclass(frozen=True)
class Evaluated:
    """Counts of the last evaluation: of asked[k - 1] guesses of head k, hits[k - 1][i] were right at rank i."""

    hits: list[list[int]]
    asked: list[int]

    @property
    def accuracies(self) -> list[list[float]]:
        return accuracies_of(self.hits, self.asked)

    def tree(self, num_nodes: int) -> MedusaTree:
        return search_tree(self.accuracies, num_nodes)


class MedusaTrainer(Trainer):
    """transformers' Trainer for an `Objective`.

    Losses are divided by the number of predicted tokens in the whole step, over all accumulated batches and processes, so
    it does not matter how a batch is split. Which rows a step has does not depend on that either, so a run may be resumed on
    another number of processes. Checkpoints hold only trained weights. Evaluation measures each head's accuracy at each rank,
    and the acceleration rate to expect from the best tree.
    """

    model: Objective
    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.evaluated: Evaluated | None = None
        self._right: dict[str, float] = {}  # accuracy of each head's first guess on a batch, and L_LM of Eq. 2
        self._measured_at = -1  # the step of this batch
        self.model_accepts_loss_kwargs = True  # the loss is divided by what `_get_num_items_in_batch` gives

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        args, rows = self.args, len(self.train_dataset)
        at_once = args.per_device_train_batch_size * args.world_size
        steps = -(-rows // (at_once * args.gradient_accumulation_steps))
        # Asked for later, since accelerate's `set_epoch` does not reach the sampler of a resumed run in several processes.
        return EpochOrder(rows, at_once if args.world_size > 1 else 1, args.seed, lambda: self.state.global_step // steps)

    def _get_num_items_in_batch(self, batch_samples, device):
        num_heads = len(self.model.heads)
        counts = torch.stack([count_asked(batch["labels"], batch["segments"], num_heads) for batch in batch_samples])
        return self.accelerator.reduce(counts.sum(0).to(device), "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        config = self.model.recipe
        if config.joint and config.lambda_0_schedule == "sine":
            # Paper B.4: lambda_0 rises by a sine to its peak at the end.
            done = self.state.global_step / max(self.state.max_steps, 1)
            self.model.lambda_0 = config.lambda_0 * math.sin(math.pi / 2 * done)
        output = model(**inputs, counts=num_items_in_batch, step=self.state.global_step)
        loss = output["loss"]
        # Each batch of an accumulated step has a share of the loss.
        shares = 1 if num_items_in_batch is None else self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if self.state.global_step != self._measured_at and logs_at(self.state.global_step + 1, self.args.logging_steps):
            self._measured_at = self.state.global_step
            self._right = self._accuracies(inputs, output["hidden"])
            if "lm_loss" in output:
                self._right["lm_loss"] = output["lm_loss"].item() * shares
        self._check(loss.item() * shares, inputs)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, ours are shares of a sum
        return (loss, output) if return_outputs else loss

    def _accuracies(self, inputs: dict[str, Tensor], hidden: Tensor) -> dict[str, float]:
        """Accuracy of each head's first guess on a batch; empty for sharded heads, which are whole only within a step."""
        if self.is_fsdp_enabled:
            return {}
        heads, counted = self.model.heads, inputs["labels"] != IGNORED
        hits, asked = rank_hits(heads, hidden.to(heads.dtype), inputs["input_ids"], counted, 1, inputs["segments"])
        return {f"head{k}_top1": row[0] for k, row in enumerate(accuracies_of(hits.tolist(), asked.tolist()), 1)}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The losses of some steps, with the heads' accuracies and the backbone's loss on one batch of the last of them."""
        super().log(logs | self._right if "loss" in logs else logs, *args, **kwargs)

    def _check(self, loss: float, inputs: dict[str, Tensor]) -> None:
        """Stop if the loss is not finite or explodes: further training would only overwrite good checkpoints."""
        config = self.model.recipe
        vocab_size = self.model.heads.config.vocab_size
        weight = sum(config.lambdas(len(self.model.heads)))
        ignorant = math.log(vocab_size) * (1 + config.lambda_0 * weight if config.joint else weight)
        untrained = self.state.global_step < config.warmup_steps  # new heads predict what the LM head does, which is far off
        if math.isfinite(loss) and (untrained or loss < EXPLODED * ignorant):
            return
        rows = self.train_dataset
        where = ", ".join(dict.fromkeys(rows[number][1].source for number in inputs["rows"].tolist()))
        raise MedusaError(
            f"loss is {loss:.4g} at step {self.state.global_step + 1}, on {where}; "
            "look at these samples, or lower --learning-rate and resume"
        )

    def create_optimizer(self, model=None):
        """Separate learning rates for heads and backbone (paper 2.2.2); no decay for biases and vectors."""
        if self.optimizer is None:
            config, objective = self.model.recipe, model or self.model
            backbone_rate = config.backbone_learning_rate
            if backbone_rate is None:
                backbone_rate = config.learning_rate / 4  # paper B.2
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in objective.named_parameters():
                if parameter.requires_grad:
                    rate = config.learning_rate if name.removeprefix("module.").startswith("heads.") else backbone_rate
                    decay = config.weight_decay if parameter.ndim > 1 else 0.0
                    groups.setdefault((rate, decay), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, objective)
            options.pop("lr")
            self.optimizer = kind(
                [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()], **options
            )
        return self.optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        objective, config = self.model, self.model.recipe
        num_heads = len(objective.heads)
        ranks = min(EVALUATED_RANKS, objective.heads.config.vocab_size)
        device = self.args.device
        hits = torch.zeros(num_heads, ranks, dtype=torch.long, device=device)
        times = torch.zeros(num_heads, dtype=torch.long, device=device)
        losses = torch.zeros(1 + num_heads, dtype=torch.double, device=device)  # of the LM head, then the heads: sums
        counts = torch.zeros_like(losses)
        objective.eval()
        with torch.no_grad():
            for batch in self._eval_batches(eval_dataset if eval_dataset is not None else self.eval_dataset):
                output = self.model_wrapped(**batch)
                asked = count_asked(batch["labels"], batch["segments"], num_heads)
                lm_loss = output.get("lm_loss", torch.zeros((), device=device))
                losses += torch.cat([lm_loss[None], output["head_losses"]]) * asked
                counts += asked
                hidden, counted = output["hidden"].to(objective.heads.dtype), batch["labels"] != IGNORED
                found = rank_hits(objective.heads, hidden, batch["input_ids"], counted, ranks, batch["segments"])
                hits, times = hits + found[0].to(device), times + found[1].to(device)
        objective.train()
        hits, times, losses, counts = (self.accelerator.reduce(total, "sum") for total in (hits, times, losses, counts))
        self.evaluated = Evaluated(hits.tolist(), times.tolist())
        lm_loss, *head_losses = (losses / counts.clamp(min=1)).tolist()
        loss = sum(weight * loss for weight, loss in zip(config.lambdas(len(head_losses)), head_losses, strict=True))
        metrics = {f"{metric_key_prefix}_loss": lm_loss + config.lambda_0 * loss if config.joint else loss}
        if config.joint:
            metrics[f"{metric_key_prefix}_lm_loss"] = lm_loss
        for k, row in enumerate((hits / times.clamp(min=1)[:, None]).cumsum(-1).tolist(), 1):
            metrics |= {f"{metric_key_prefix}_head{k}_top{i}": value for i, value in enumerate(row[:SHOWN_RANKS], 1)}
        metrics[f"{metric_key_prefix}_acceleration_rate"] = expected_acceptance_length(
            self.evaluated.tree(config.tree_nodes), self.evaluated.accuracies
        )
        self.log(metrics)
        return metrics

    def _eval_batches(self, rows: Any) -> Iterator[dict[str, Tensor]]:
        """This process's share of the batches; all processes get equally many, some perhaps one without labels."""
        size, processes = self.args.per_device_eval_batch_size, self.args.world_size
        for first in range(0, len(rows), size * processes):
            mine = range(first + self.args.process_index * size, min(first + (self.args.process_index + 1) * size, len(rows)))
            yield self._prepare_inputs(self.data_collator([rows[number] for number in mine or (FILLER,)]))

    def trained(self) -> dict[str, Tensor]:
        """The complete trained parameters on the CPU, gathered from all processes if they are sharded."""
        named = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: (p.full_tensor() if isinstance(p, DTensor) else p).cpu() for name, p in named.items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:  # there, shards of the model are saved with those of the optimiser
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, self.trained())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        sharded = any(Path(resume_from_checkpoint).glob("pytorch_model_fsdp*"))
        if sharded != self.is_fsdp_enabled:
            how = ("with", "without") if sharded else ("without", "with")
            raise CheckpointError(
                f"{resume_from_checkpoint} was saved {how[0]} FSDP and cannot be resumed {how[1]} it; "
                f"launch the command {how[0]} FSDP, on any number of processes"
            )
        if sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        tensors = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        parameters = {name: p for name, p in (model or self.model).named_parameters() if p.requires_grad}
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
            raise CheckpointError(f"{resume_from_checkpoint} belongs to a run with other parameters; give another --output")
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)


def newest_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint: `trainer_state.json` is the last file of one to be written."""
    found = sorted(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        except (OSError, ValueError):
            continue
    return None


FIRST_STEPS = (1, 2, 5, 10)  # always logged, so that a bad run shows early


def logs_at(step: int, every: int) -> bool:
    return step in FIRST_STEPS or step % every == 0


class Progress(ProgressCallback):
    """A progress bar on stderr with the newest figures, and a line above it for each log; stdout is for results."""

    SHOWN = ("loss", "eval_loss", "eval_head1_top1", "eval_acceleration_rate")

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        control.should_log = control.should_log or logs_at(state.global_step, args.logging_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        self.training_bar.set_postfix({key: f"{logs[key]:.4g}" for key in self.SHOWN if key in logs})
        for loss, head, what in (("loss", "head", ""), ("eval_loss", "eval_head", ", evaluation")):
            if loss in logs:
                right = [
                    f"{100 * value:.0f}" for name, value in logs.items() if name.startswith(head) and name.endswith("_top1")
                ]
                shown = f", head accuracies {' '.join(right)} %" if right else ""
                if (lm_loss := logs.get(loss.replace("loss", "lm_loss"))) is not None:
                    shown = f", of the backbone {lm_loss:.4f}{shown}"
                line = f"step {state.global_step} of {state.max_steps}{what}: loss {logs[loss]:.3f}{shown}"
                self.training_bar.write(line, file=sys.stderr)
