"""Pretraining: a Llama from scratch, in as many steps as its share of the time allows, stopped and resumed at any of them.

A loop of its own and not transformers' Trainer, whose schedule must know its length before the first step: here the first
steps, at a learning rate that only warms up, measure how many there will be.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from end_to_end.source import TOKENIZER, held_out_ids, training_tokens
from end_to_end.work import Size, SliceOver, Work
from medusa.training.losses import cross_entropy

BACKBONE, CHECKPOINT = "backbone", "pretraining.pt"
RESERVE = 20.0  # seconds at the end of a slice in which to write a checkpoint
CHECKPOINT_SECONDS = 180.0  # no more is lost to a kill
STARTING_ANEW = 0.04  # of the time: checkpoints, compiling again, measuring the end
LOGGED_STEPS = 50
MEASURED_ROWS = 64  # of held-out text


class Pretraining:
    """The model, its optimiser and where they are in the schedule.

    Attributes:
        steps: of the schedule, once the rate is measured.
        rate: tokens a second, measured.
        log: (step, loss) every so many steps.
    """

    def __init__(self, work: Work, vocabulary: int, end: int):
        size = self.size = work.size
        self.device = work.device
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.attention_heads,
            max_position_embeddings=size.length,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=None,  # a padding token's embedding would never be trained
        )
        self.model = LlamaForCausalLM(config).to(self.device)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.step, self.rate = 0, 0.0
        self.steps: int | None = None
        self.log: list[tuple[int, float]] = []
        self.micro_batch, self.compiled = size.micro_batch, "no"

    def state(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("step", "steps", "rate", "log", "micro_batch")}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **kept}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, value)

    def compile(self) -> None:
        """Compile the layers, which share one graph: seconds, where the whole model takes a minute."""
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)
        self.compiled = "layers"

    def uncompile(self) -> None:
        for layer in self.model.model.layers:
            layer._compiled_call_impl = None

    def train_on(self, ids: Tensor) -> float:  # (B, T) long -> the loss
        """One optimiser step; a batch that does not fit is cut up, layers that do not compile run as they are."""
        while True:
            try:
                return self._train_on(ids)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                self.micro_batch //= 2
                torch.cuda.empty_cache()
            except Exception as error:  # compilers fail in ways of their own
                if self.compiled != "layers":
                    raise
                self.compiled = f"no: {str(error).strip().splitlines()[0][:200]}"
                self.uncompile()

    def _train_on(self, ids: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for part in ids.split(self.micro_batch):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                share = self.model(input_ids=part, labels=part, use_cache=False).loss * (len(part) / len(ids))
            share.backward()
            loss += share.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()  # waits for the device

    def learning_rate(self) -> float:
        """A linear warmup, then a cosine to zero at the end of the schedule."""
        size = self.size
        if self.steps is None or self.step < size.warmup:
            return size.learning_rate * min(1.0, (self.step + 1) / size.warmup)
        return size.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.step - size.warmup) / (self.steps - size.warmup)))


def batch_of(tokens: np.ndarray, step: int, size: Size) -> Tensor:  # (B, T) long
    """The rows of a step: every epoch is a new order of all rows, cut at another place."""
    rows = len(tokens) // size.length - 1
    steps_an_epoch = max(1, rows // size.batch_size)
    chance = np.random.default_rng(step // steps_an_epoch)
    shift = int(chance.integers(size.length))
    first = step % steps_an_epoch * size.batch_size
    chosen = chance.permutation(rows)[first : first + size.batch_size]
    found = [tokens[shift + row * size.length : shift + (row + 1) * size.length] for row in chosen]
    return torch.from_numpy(np.stack(found).astype(np.int64))


def pretraining(work: Work) -> dict[str, Any]:
    """The stage: a backbone with its tokenizer on the disk."""
    size, tokens = work.size, training_tokens(work)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work.folder / TOKENIZER)
    run = Pretraining(work, len(tokenizer), tokenizer.eos_token_id)
    checkpoint = work.folder / CHECKPOINT
    if checkpoint.is_file():
        run.load(torch.load(checkpoint, map_location=work.device, weights_only=True))
    if work.device.type == "cuda":
        run.compile()
    written, timed_from = work.now(), 0.0

    def save() -> None:
        partial = checkpoint.with_suffix(".partial")
        torch.save(run.state(), partial)
        partial.replace(checkpoint)

    first, last = size.timed_steps
    began = run.step
    while run.steps is None or run.step < run.steps:
        try:
            work.room(RESERVE)
        except SliceOver:
            save()
            raise
        loss = run.train_on(batch_of(tokens, run.step, size).to(work.device))
        run.step += 1
        if run.step % LOGGED_STEPS == 0 or run.step == run.steps:
            run.log.append((run.step, loss))
        if run.steps is None and run.step - began == first:
            timed_from = work.now()
        elif run.steps is None and run.step - began == last:
            seconds = (work.now() - timed_from) / (last - first)
            run.rate = size.batch_size * size.length / seconds
            run.steps = run.step + max(size.warmup, int(work.left_of_stage() * (1 - STARTING_ANEW) / seconds))
        if work.now() - written > CHECKPOINT_SECONDS:
            save()
            written = work.now()

    run.uncompile()  # for texts of all lengths
    model = run.model.eval()
    record = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": run.step,
        "tokens": run.step * size.batch_size * size.length,
        "epochs": run.step * size.batch_size * size.length / len(tokens),
        "tokens_per_second": run.rate,
        "micro_batch": run.micro_batch,
        "compiled": run.compiled,
        "log": run.log,
        "held_out_loss": text_loss(model, work),
    }
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.to(work.dtype).save_pretrained(work.folder / BACKBONE)
    tokenizer.save_pretrained(work.folder / BACKBONE)
    checkpoint.unlink(missing_ok=True)
    return record


@torch.inference_mode()
def text_loss(model: LlamaForCausalLM, work: Work) -> float:
    """Mean cross-entropy on the beginnings of held-out files, in nats a token."""
    total, count = 0.0, 0
    for number, ids in enumerate(held_out_ids(work, "test")):
        if number == MEASURED_ROWS:
            break
        row = torch.tensor(ids[: work.size.length], device=work.device)
        logits = model(input_ids=row[None, :-1], use_cache=False).logits[0]
        total += cross_entropy(logits.float(), row[1:]).item()
        count += len(row) - 1
    return total / count
