"""A training run: from a backbone and data to a folder of heads, through one stage or two."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import random
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa import __version__
from medusa.checkpoints.adapter import ADAPTER_FILES, attach_adapter, save_adapter
from medusa.checkpoints.quantization import make_differentiable
from medusa.checkpoints.reader import checkpoint_of, load_heads
from medusa.checkpoints.writer import save_heads
from medusa.config import HEADS_FILE, TREE_FILE, read_json_object
from medusa.errors import InvalidInput
from medusa.heads import MedusaHeads
from medusa.kernels.quantized import shared_map
from medusa.model import MedusaModel
from medusa.runs.console import note
from medusa.runs.files import write_json
from medusa.runs.provenance import fingerprint
from medusa.runs.records import hold, make_folder, refuse_other
from medusa.training.config import TrainingConfig
from medusa.training.data import Rows, collate, draft_vocabulary
from medusa.training.hidden_states import save_hidden_states
from medusa.training.model_card import write_card
from medusa.training.objective import Objective
from medusa.training.trainer import MedusaTrainer, Progress, newest_checkpoint
from medusa.trees.files import save_tree

RECORD = "training.json"
IDENTITY = "run.json"  # configuration, data and backbone of the run, so that only the same run is resumed
FREE_TO_CHANGE = ("max_steps", "epochs", "logging_steps", "eval_steps", "save_steps", "tree_nodes", "report_to")
ROWS_PER_STEP = "rows per step"
SPLIT = ("batch_size", "gradient_accumulation")  # free too, with the number of processes, if a step has as many rows as before
MOST_HELD_OUT, FEWEST_TO_HOLD_OUT_OF = 512, 10  # rows


def train_heads(
    model: MedusaModel,
    rows: Rows,
    output: str | Path,
    config: TrainingConfig,
    eval_rows: Rows | None = None,
    resume: bool = False,
    hidden_states: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train heads for a backbone, and the backbone too if the configuration says so; save all in `output`.

    `output` then holds the heads, the tree built from their accuracies, the adapter or the fine-tuned backbone of
    Medusa-2, the configuration with log and metrics (`training.json`) and a model card.

    Args:
        model: the backbone; its heads, if any, are the starting point.
        eval_rows: rows to evaluate on; None: `config.held_out` of the rows are held out, and if that is none, some of the
            training rows are used, which flatters the heads.
        resume: continue from the newest complete checkpoint in `output`, if any.
        hidden_states: folder to store the untrained backbone's hidden states in; heads of a frozen backbone are trained from
            them, and with `lm_loss="distill"` they are the teacher's.
        callbacks: callbacks of transformers' Trainer; an error in one ends the run, which can be resumed.

    Returns:
        The metrics of the final evaluation.

    Raises:
        InvalidInput: options or data that cannot be used.
        MedusaError: the loss is not a number or explodes.
    """
    output = Path(output)
    make_folder(output)
    if hidden_states is not None and config.joint and config.lm_loss != "distill":
        raise InvalidInput("a backbone that is trained on labels uses no stored hidden states; drop --hidden-states")
    with hold(output / IDENTITY) if is_main_process() else nullcontext():
        _claim(output, model, rows, config, resume)
        if resume and (metrics := _finished(output, config)) is not None:
            if is_main_process():
                note(f"the training in {output} is finished; raise --epochs or --max-steps to continue it")
            return metrics
        return _train(model, rows, output, config, eval_rows, resume, hidden_states, callbacks)


def _train(
    model: MedusaModel,
    rows: Rows,
    output: Path,
    config: TrainingConfig,
    eval_rows: Rows | None,
    resume: bool,
    hidden_states: str | Path | None,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, float]:
    if eval_rows is None:
        rows, eval_rows = hold_out(rows, config.held_out, config.seed)
        eval_rows = eval_rows or Rows(rows.rows[:FEWEST_TO_HOLD_OUT_OF])  # flatters the heads; the report says so
    if config.heads_steps and model.heads is None:
        first = _heads_alone(model, rows, output / "stage-1", config, eval_rows, resume, hidden_states, callbacks)
        model = MedusaModel(model.backbone, first)
    if config.joint and config.lm_loss == "distill" and getattr(model.backbone, "hf_quantizer", None) is not None:
        # Paper 2.3.2
        warnings.warn("the teacher is the quantised model; without quantization the result may be better", stacklevel=2)
    base_model = model.backbone.config._name_or_path or None
    heads = _new_heads(model, config, rows)
    arguments = _arguments(model, output, config)  # sets up the processes
    data: dict[str, Any] = {"train": rows, "eval": eval_rows}
    if hidden_states is not None:
        with PartialState().main_process_first():
            data = {name: save_hidden_states(model, part, Path(hidden_states) / name) for name, part in data.items()}
    set_seed(config.seed)  # of a new adapter; transformers' Trainer does it later
    model = _trainable(model, config)
    # Including a new adapter.
    heads.share(shared_map(model.backbone.get_output_embeddings()), model.backbone.get_input_embeddings())
    objective = Objective(model, heads, config)
    trainer = MedusaTrainer(
        model=objective, args=arguments, train_dataset=data["train"], eval_dataset=data["eval"], data_collator=collate
    )
    for callback in (ProgressCallback, PrinterCallback):  # both write to stdout
        trainer.remove_callback(callback)
    for callback in (Progress(), *callbacks):
        trainer.add_callback(callback)
    newest = newest_checkpoint(output) if resume else None
    if resume and newest is None and is_main_process():
        note(f"there is no checkpoint in {output}; this training starts with its first step")
    _note_all_warmup(config, len(rows))
    trainer.train(resume_from_checkpoint=newest)
    trained = trainer.trained()  # gathered from all processes
    if trainer.is_world_process_zero():
        _save(output, objective, trained, base_model)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        _report(output, trainer, rows, metrics, base_model, held_out=all(row is not eval_rows.rows[0] for row in rows))
    trainer.accelerator.wait_for_everyone()
    objective.eval()  # no dropout in what the caller still holds
    return metrics


def _heads_alone(
    model: MedusaModel, rows: Rows, output: Path, config: TrainingConfig, eval_rows: Rows, resume: bool, *rest: Any
) -> MedusaHeads:
    """The heads of the first stage, in which the backbone is frozen (paper 2.2.2); `rest` as in `train_heads`."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise InvalidInput("under FSDP the two stages are two runs: train medusa-1 first, then give its folder as --heads")
    if not (resume and (output / RECORD).is_file()):
        steps = config.max_steps if config.heads_steps < 0 else config.heads_steps
        alone = dataclasses.replace(config, backbone="frozen", heads_steps=0, max_steps=steps)
        train_heads(model, rows, output, alone, eval_rows, resume, *rest)
    return load_heads(output)


def _finished(output: Path, config: TrainingConfig) -> dict[str, float] | None:
    """The metrics of a run of as many steps that is finished; None: there is something left to do."""
    saved = all((output / name).is_file() for name in (HEADS_FILE, RECORD))
    record = read_json_object(output / RECORD) if saved else None
    if record is None or any(record["config"][name] != getattr(config, name) for name in ("max_steps", "epochs")):
        return None
    return record["metrics"]


def is_main_process() -> bool:
    """Whether this process is the one that writes; known before the processes are set up."""
    return os.environ.get("RANK", "0") == "0"


def _claim(output: Path, model: MedusaModel, rows: Rows, config: TrainingConfig, resume: bool) -> None:
    """Note the identity of this run; refuse a folder of another run, or of one that would be restarted unintentionally."""
    wanted = {name: value for name, value in dataclasses.asdict(config).items() if name not in (*FREE_TO_CHANGE, *SPLIT)}
    wanted[ROWS_PER_STEP] = _rows_per_step(config)
    wanted |= {"data": rows.fingerprint(), "backbone weights": fingerprint(model.backbone)}
    path = output / IDENTITY
    refuse_begun(output, resume)
    if path.is_file() and any(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        found = read_json_object(path)
        _refuse_other_split(output, found.get(ROWS_PER_STEP), config)
        refuse_other(output, found, wanted)
    if is_main_process():
        write_json(path, wanted)
        if not resume:  # no file of an earlier run may be mistaken for one of this run
            for name in (*ADAPTER_FILES, TREE_FILE, HEADS_FILE, RECORD, "README.md"):
                (output / name).unlink(missing_ok=True)


def _note_all_warmup(config: TrainingConfig, rows: int) -> None:
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * rows / _rows_per_step(config))
    if steps <= config.warmup_steps and is_main_process():
        remedy = "use more data or --epochs, or lower --batch-size, --gradient-accumulation or --warmup-steps"
        note(f"all {steps} steps are warmup (--warmup-steps {config.warmup_steps}): the heads learn next to nothing; {remedy}")


def _processes() -> int:
    """The number of processes of this run; known before they are set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rows_per_step(config: TrainingConfig) -> int:
    return config.batch_size * config.gradient_accumulation * _processes()


def _refuse_other_split(output: Path, rows: int | None, config: TrainingConfig) -> None:
    """Refuse to resume a run with other rows in a step; on another number of processes, they have to be split otherwise."""
    at_once = config.batch_size * _processes()
    if rows != _rows_per_step(config):
        remedy = f"pass --gradient-accumulation {rows // at_once}" if rows and rows % at_once == 0 else "pass others"
        raise InvalidInput(
            f"{output} was made with {rows} rows per step, this run has {config.batch_size} x {config.gradient_accumulation} x "
            f"{_processes()} (batch size x gradient accumulation x processes); {remedy}"
        )


def refuse_begun(output: Path, resume: bool) -> None:
    """Refuse a folder with checkpoints of a run, which would be restarted unintentionally."""
    if not resume and (output / IDENTITY).is_file() and any(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise InvalidInput(f"{output} holds checkpoints of a run; continue it with --resume, or give another --output")


def number_to_hold_out(rows: Rows, share: float) -> int:
    """Number of rows to hold out; 0 if there are too few to spare any."""
    number = min(MOST_HELD_OUT, round(share * len(rows)))
    return max(number, 1) if share > 0 and len(rows) >= FEWEST_TO_HOLD_OUT_OF else number


def hold_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows | None]:
    """The rows to train on and the rows to evaluate on; None if there are too few to spare any."""
    number = number_to_hold_out(rows, share)
    if number == 0:
        return rows, None
    chosen = set(random.Random(seed).sample(range(len(rows)), number))
    kept = [row for number, row in enumerate(rows) if number not in chosen]
    held = [row for number, row in enumerate(rows) if number in chosen]
    return dataclasses.replace(rows, rows=kept), Rows(held)


def _new_heads(model: MedusaModel, config: TrainingConfig, rows: Rows) -> MedusaHeads:
    """Heads in float32, ready to be trained: those the model has, or new ones."""
    lm_head = shared_map(model.backbone.get_output_embeddings())
    tokens = draft_vocabulary(rows, config.draft_vocabulary, model.vocab_size)
    if model.heads is not None and model.heads.config.medusa_draft_vocabulary is not None:
        tokens = model.heads.token_map  # those that the heads score
    reads = _reads(model, config, rows) if config.heads_kind != "medusa" else {}
    heads = MedusaHeads.for_lm_head(lm_head, config.num_heads, config.num_layers, config.shared_lm_head, tokens, **reads)
    if model.heads is not None:
        _start_from(heads, model.heads)
    return heads.float().requires_grad_(True)


def _reads(model: MedusaModel, config: TrainingConfig, rows: Rows) -> dict[str, Any]:
    """Arguments of heads that read tokens: the width of the embeddings, and the factor from their size to that of the hidden
    states, measured on the first rows."""
    embedding = model.backbone.get_input_embeddings()
    ids = torch.cat([row.ids.long() for row in rows.rows[:4]])[None, :512].to(model.device)
    with torch.no_grad():
        embedded, hidden = embedding(ids).float(), model.hidden_states(ids).float()
    scale = float(hidden.square().mean().sqrt() / embedded.square().mean().sqrt())
    return {"heads_kind": config.heads_kind, "embedding_size": embedded.shape[-1], "embedding_scale": scale}


def _start_from(heads: MedusaHeads, given: MedusaHeads) -> None:
    """Load heads into others of the same kind or of one that reads more; the added weights start at zero."""
    found = given.state_dict()
    if given.kind != "medusa":  # keep the scale that these heads were trained with
        heads.config = dataclasses.replace(heads.config, medusa_embedding_scale=given.config.medusa_embedding_scale)
    for name, tensor in heads.state_dict().items():
        start = found.pop(name, None)
        if name.endswith(".tokens.weight") and (start is None or start.shape[1] < tensor.shape[1]):
            read = start if start is not None else tensor[:, :0]
            start = torch.cat([read.to(tensor), torch.zeros_like(tensor[:, read.shape[1] :])], 1)
        if start is None or start.shape != tensor.shape:
            raise InvalidInput("the sizes of the heads to start from differ from the configuration's")
        tensor.copy_(start)
    if found:
        raise InvalidInput(f"the heads to start from are of kind {given.kind}, expected {heads.kind} or one that reads less")


def _trainable(model: MedusaModel, config: TrainingConfig) -> MedusaModel:
    """The model, in which only the trained part of the backbone requires a gradient."""
    backbone = model.backbone.requires_grad_(False)
    quantizer = getattr(backbone, "hf_quantizer", None)
    if config.joint and quantizer is not None and not quantizer.is_trainable:
        raise InvalidInput("this backbone's quantised weights have no gradients; train on the original, or nf4, with a LoRA")
    if config.backbone == "lora":
        make_differentiable(backbone)
        attach_adapter(backbone, config.lora_rank, config.lora_alpha, config.lora_dropout)
    elif config.backbone == "full":
        backbone.float().requires_grad_(True)
    else:
        return model
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.enable_input_require_grads()
    return MedusaModel(backbone, None)


def _arguments(model: MedusaModel, output: Path, config: TrainingConfig) -> TrainingArguments:
    on_gpu = model.device.type == "cuda"
    small = config.optimizer == "adamw-8bit" or (
        config.optimizer == "auto" and on_gpu and importlib.util.find_spec("bitsandbytes") is not None
    )
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
        optim="adamw_bnb_8bit" if small else "adamw_torch",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=config.logging_steps,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        report_to=config.report_to,
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:  # DataParallel's copies would all run the first GPU's backbone; `accelerate launch` takes several
        arguments._n_gpu = 1
    return arguments


def _save(output: Path, objective: Objective, trained: dict[str, Tensor], base_model: str | None) -> None:
    """Save the heads, and the adapter or the backbone if it was trained, from tensors gathered from all processes."""
    backbone, config = objective.backbone, objective.recipe
    dtype = torch.float32 if config.backbone == "full" else objective.compute
    tensors = _below("heads.", trained) | dict(objective.heads.named_buffers())
    heads = checkpoint_of(tensors, objective.heads.config.to_dict(), Path("the trained heads")).heads(dtype)
    if config.backbone == "full":
        # One folder of backbone and heads: the backbone's config describes the heads.
        for name, value in heads.config.to_dict().items():
            if name.startswith("medusa_"):
                setattr(backbone.config, name, value)
        backbone.save_pretrained(output, state_dict=_below("backbone.", trained))
        save_heads(heads, output, base_model, config=False)
        return
    if config.backbone == "lora":
        save_adapter(backbone, output, base_model, _below("backbone.", trained))
    save_heads(heads, output, base_model)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _report(
    output: Path, trainer: MedusaTrainer, rows: Rows, metrics: dict[str, float], base_model: str | None, held_out: bool
) -> None:
    """Save the record of the run, the tree and the model card."""
    config, evaluated = trainer.model.recipe, trainer.evaluated
    assert evaluated is not None
    tree = evaluated.tree(config.tree_nodes)
    save_tree(tree, output / TREE_FILE)
    heads = dataclasses.replace(trainer.model.heads.config, base_model_name_or_path=base_model)
    write_card(output, config, heads, metrics, max(evaluated.asked), len(tree), rows, held_out)
    record = {
        "config": dataclasses.asdict(config),
        "base_model": base_model,
        "data": {"fingerprint": rows.fingerprint(), "rows": len(rows), "tokens": rows.tokens, "labelled": rows.labelled},
        "skipped": dict(rows.skips.reasons),
        "cut": rows.cut,
        "metrics": metrics,
        "measured_on": "rows held out" if held_out else "rows that were learnt",
        "accuracies": {**dataclasses.asdict(evaluated), "accuracies": evaluated.accuracies},
        "log": trainer.state.log_history,
        "processes": {"type": trainer.accelerator.distributed_type.value, "number": trainer.accelerator.num_processes},
        "versions": {"medusa": __version__, **{name: version(name) for name in ("torch", "transformers", "accelerate")}},
    }
    write_json(output / RECORD, record)
