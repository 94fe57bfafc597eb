"""The heads: the backbone writes its own training data, then Medusa-1 and Medusa-2 are trained in the time that each has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback

from end_to_end.pretraining import BACKBONE
from end_to_end.source import training_tokens
from end_to_end.work import SliceOver, Work
from medusa import MedusaModel
from medusa.checkpoints.reader import load_heads
from medusa.model import load_backbone
from medusa.training.config import TrainingConfig, resolve
from medusa.training.data import Row, Rows
from medusa.training.run import RECORD, train_heads

OWN, MEDUSA_1, MEDUSA_2 = "own", "medusa-1", "medusa-2"
TEMPERATURES = (0.0, 0.8)  # batch by batch; 0 is greedy
MOST_OWN = 100  # batches
NUM_HEADS = 5
LEAST_STEPS = 4
RESERVE = 25.0  # seconds at the end of a slice in which to write a checkpoint
ENDING = 15.0  # seconds of a run for its evaluation and files
PLAN = "{}.steps.json"


def continuations(work: Work) -> dict[str, Any]:
    """The stage: the backbone continues pieces of its training text, greedily and sampled in turn (paper 2.3.2)."""
    size, tokens, folder = work.size, training_tokens(work), work.folder / OWN
    folder.mkdir(exist_ok=True)
    model, seconds = MedusaModel(backbone(work)), 0.0
    for batch in range(MOST_OWN):
        path = folder / f"{batch:03d}.npy"
        if path.is_file():
            continue
        if batch >= len(TEMPERATURES) and work.left_of_stage() < seconds:
            break
        work.room(1.5 * seconds)
        began, chance = work.now(), np.random.default_rng(batch)
        starts = chance.integers(len(tokens) - size.own_prompt, size=size.own_batch)
        prompts = torch.from_numpy(np.stack([tokens[at : at + size.own_prompt] for at in starts]).astype(np.int64))
        temperature = TEMPERATURES[batch % len(TEMPERATURES)]
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "seed": batch} if temperature else {}
        output = model.generate(prompts, max_new_tokens=size.own_new, eos_token_id=[], **sampling)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, output.cpu().numpy().astype(np.uint16))
        partial.replace(path)
        seconds = work.now() - began
    batches = len(list(folder.glob("*.npy")))
    return {"rows": batches * size.own_batch, "new_tokens": batches * size.own_batch * size.own_new}


def rows(work: Work) -> Rows:
    """What the backbone wrote, and as many rows of its training text, which keep the heads from knowing its habits alone."""
    own = np.concatenate([np.load(path) for path in sorted((work.folder / OWN).glob("*.npy"))])
    length, tokens = own.shape[1], training_tokens(work)
    starts = np.random.default_rng(0).integers(len(tokens) - length, size=len(own))
    text = np.stack([tokens[at : at + length] for at in starts])
    ids = torch.from_numpy(np.concatenate([own, text]).astype(np.int32))
    spoken = torch.ones(length, dtype=torch.bool)
    return Rows([Row(row, spoken, (length,)) for row in ids])


def backbone(work: Work) -> PreTrainedModel:
    return load_backbone(work.folder / BACKBONE, dtype=work.dtype).to(work.device)


def medusa_1(work: Work) -> dict[str, Any]:
    """The stage: heads on the frozen backbone."""
    return _trained(work, MEDUSA_1, lambda: MedusaModel(backbone(work)), "medusa-1-self-distill", {})


def medusa_2(work: Work) -> dict[str, Any]:
    """The stage: those heads trained on, jointly with an adapter that is held to the original's distribution."""
    # lambda_0 as in the two-stage recipe; the single stage's 0.01 is for heads that begin from nothing.
    options = {"lambda_0": 0.2, "lambda_0_schedule": "constant", "learning_rate": work.size.head_rate / 2}
    start = work.folder / MEDUSA_1
    return _trained(work, MEDUSA_2, lambda: MedusaModel(backbone(work), load_heads(start)), "medusa-2-self-distill", options)


def _trained(work: Work, name: str, model: Callable[[], MedusaModel], recipe: str, options: dict[str, Any]) -> dict[str, Any]:
    """Heads trained for as many steps as the stage has time for, measured on a few steps that are thrown away."""
    size, data, folder = work.size, rows(work), work.folder / name
    common = {"num_heads": NUM_HEADS, "batch_size": size.head_batch, "gradient_accumulation": 1, "optimizer": "adamw"}

    def config(steps: int, **more: Any) -> TrainingConfig:
        warmup, saves = max(1, steps // 20), max(1, steps // 2)
        given = {"learning_rate": size.head_rate, **common, **options, **more}
        return resolve(recipe, given | {"max_steps": steps, "warmup_steps": warmup, "save_steps": saves})

    steps = work.read(PLAN.format(name))
    if steps is None:
        work.room(2 * RESERVE)
        seconds = _seconds_a_step(work, model(), data, config(size.probed_steps[1], held_out=0.0))
        steps = max(LEAST_STEPS, int((work.left_of_stage() - ENDING) / seconds))
        work.write(PLAN.format(name), steps)
    work.room(2 * RESERVE)
    train_heads(model(), data, folder, config(steps), resume=True, callbacks=[StopWithSlice(work)])
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    kept = {key: record[key] for key in ("config", "data", "metrics", "accuracies")}
    return {"steps": steps, "tokens": steps * size.head_batch * len(data.rows[0]), **kept}


def _seconds_a_step(work: Work, model: MedusaModel, data: Rows, config: TrainingConfig) -> float:
    first, last = work.size.probed_steps
    folder = work.folder / "probe"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    stopwatch = Stopwatch(work)
    train_heads(model, Rows(data.rows[: last * config.batch_size]), folder, config, callbacks=[stopwatch])
    shutil.rmtree(folder)
    return (stopwatch.times[last] - stopwatch.times[first]) / (last - first)


class Stopwatch(TrainerCallback):
    """When each step was done."""

    def __init__(self, work: Work):
        self._work = work
        self.times: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times[state.global_step] = self._work.now()


class StopWithSlice(TrainerCallback):
    """Has a checkpoint written shortly before the slice is over, and ends the run there."""

    def __init__(self, work: Work):
        self._work = work
        self._stop = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop = self._work.left() < RESERVE and state.global_step < state.max_steps
        control.should_save |= self._stop

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stop:
            raise SliceOver
