"""Training options, and the named recipes that set them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from medusa.config import HeadsKind, from_mapping
from medusa.errors import ConfigError, InvalidInput
from medusa.runs.files import read_yaml

_EXPONENT = re.compile(r"\d+[eE][-+]?\d+")
METHOD = "medusa-1"  # the default
RECIPES = Path(__file__).parent / "recipes"


def _option(default: Any, text: str) -> Any:
    """A field with the description that `medusa train --help` shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainingConfig:
    """Every option of a training run. The defaults are those of the paper's Medusa-1 (appendix B), except for soft targets."""

    # The heads.
    num_heads: int = _option(5, "number of heads, K")
    num_layers: int = _option(1, "residual blocks per head")
    shared_lm_head: bool = _option(False, "train only the residual blocks; the heads predict through the backbone's LM head")
    heads_kind: HeadsKind = _option(  # noqa: RUF009
        "medusa", "what heads also read: nothing, the root, or the path from the root"
    )
    draft_vocabulary: str = _option("all", "tokens that heads score: all, a number, or auto: the fewest for 99 % of the text")
    # Their loss, Eq. 1.
    lambda_base: float = _option(0.8, "weight of head k's loss: lambda_base ** k")
    targets: Literal["soft", "hard"] = _option("soft", "what heads learn: the backbone's distribution or the text's token")
    soft_top: int = _option(32, "number of tokens of the backbone's distribution that soft targets keep")
    # The backbone.
    backbone: Literal["frozen", "lora", "full"] = _option("frozen", "how the backbone is trained; frozen is Medusa-1")
    quantization: Literal["none", "nf4", "int8"] = _option("none", "how the backbone's weights are stored (bitsandbytes)")
    lm_loss: Literal["labels", "distill"] = _option("labels", "L_LM: on the text, or KL to the backbone without its adapter")
    lambda_0: float = _option(0.2, "weight of the heads' loss (Eq. 1) in Eq. 2")
    lambda_0_schedule: Literal["constant", "sine"] = _option("constant", "sine: rises from 0 to lambda_0 at the end")
    heads_steps: int = _option(0, "number of steps of stage 1, which trains the heads alone; -1: as many as stage 2")
    lora_rank: int = _option(32, "rank r of the adapter")
    lora_alpha: int = _option(16, "scale alpha of the adapter")
    lora_dropout: float = _option(0.05, "dropout before the adapter")
    backbone_learning_rate: float | None = _option(None, "peak learning rate of the backbone; none: a quarter of the heads'")
    # Data.
    max_length: int = _option(2048, "maximum number of tokens in a row")
    packing: bool = _option(False, "put several short samples into one row")
    held_out: float = _option(0.01, "share of the rows to evaluate on if no evaluation data is given")
    # Optimisation.
    max_steps: int = _option(-1, "number of optimiser steps; -1: as many as the epochs take")
    epochs: float = _option(2.0, "number of passes over the data")
    batch_size: int = _option(8, "number of rows in a batch, per device")
    gradient_accumulation: int = _option(1, "number of batches per optimiser step")
    learning_rate: float = _option(2e-3, "peak learning rate of the heads; cosine to zero after the warmup")
    warmup_steps: int = _option(40, "number of steps of linear warmup")
    weight_decay: float = _option(0.0, "decoupled weight decay, as in AdamW")
    optimizer: Literal["auto", "adamw", "adamw-8bit"] = _option("auto", "auto: 8-bit on a GPU if bitsandbytes is installed")
    gradient_checkpointing: bool = _option(False, "recompute the activations of a trained backbone, to save memory")
    loss_chunk: int = _option(0, "number of rows of logits in memory at a time; 0: at most 1024, and at most 2^26 logits")
    seed: int = _option(0, "seed of data order, dropout and new weights")
    # Logs and files.
    logging_steps: int = _option(20, "number of steps between lines of the log")
    eval_steps: int = _option(0, "number of steps between evaluations; 0: only at the end")
    save_steps: int = _option(500, "number of steps between checkpoints")
    tree_nodes: int = _option(64, "size of the tree built from the measured accuracies, the root included")
    report_to: str = _option("none", "tensorboard, wandb or another reporter of transformers' Trainer")

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidInput(f"{name} is {value}, expected a finite number")
        positive: tuple[str, ...] = ("num_heads", "epochs", "batch_size", "gradient_accumulation", "max_length")
        positive += ("soft_top", "lora_rank", "lora_alpha", "learning_rate", "logging_steps", "save_steps", "tree_nodes")
        for name in positive:
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in (
            "seed",
            "num_layers",
            "lambda_0",
            "lambda_base",
            "warmup_steps",
            "weight_decay",
            "eval_steps",
            "loss_chunk",
        ):
            if not getattr(self, name) >= 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.draft_vocabulary not in ("all", "auto") and not (
            self.draft_vocabulary.isdecimal() and int(self.draft_vocabulary) > 0
        ):
            raise InvalidInput(f"draft_vocabulary is {self.draft_vocabulary!r}, expected all, auto or a number of tokens")
        for name in ("max_steps", "heads_steps"):
            if getattr(self, name) < -1 or (name == "max_steps" and self.max_steps == 0):
                raise InvalidInput(f"{name} is {getattr(self, name)}, expected -1 or a number of steps")
        if self.backbone_learning_rate is not None and not self.backbone_learning_rate >= 0:
            raise InvalidInput(f"backbone_learning_rate is {self.backbone_learning_rate}, expected at least 0")
        for name in ("held_out", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, expected at least 0 and below 1")
        if self.backbone == "full" and self.quantization != "none":
            raise InvalidInput(f"backbone=full cannot train {self.quantization} weights; use backbone=lora")
        if self.backbone == "full" and self.lm_loss == "distill":
            raise InvalidInput("lm_loss=distill needs the original model, which backbone=full overwrites; use backbone=lora")
        if self.backbone == "frozen" and self.heads_steps:
            raise InvalidInput("heads_steps needs a trained backbone; with a frozen one every step trains the heads alone")

    def lambdas(self, num_heads: int) -> list[float]:
        """The weight of each head's loss (paper 2.2.1, Eq. 1): lambda_k is the k-th power of a constant."""
        return [self.lambda_base**k for k in range(1, num_heads + 1)]

    @property
    def joint(self) -> bool:
        """Whether the backbone is trained together with the heads (Medusa-2)."""
        return self.backbone != "frozen"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe(name: str) -> dict[str, Any]:
    """The options that a named method sets.

    Raises:
        ConfigError: no such recipe.
    """
    path = RECIPES / f"{name}.yaml"
    if name not in recipe_names():
        raise ConfigError(f"no method {name!r}; there are {', '.join(recipe_names())}")
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def read_options(path: Path) -> dict[str, Any]:
    """The `option: value` lines of a user's YAML file.

    Raises:
        InvalidInput: the file cannot be read, or holds something else.
    """
    found = read_yaml(path, InvalidInput) or {}
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds a {type(found).__name__}, expected `option: value` lines")
    # YAML reads 2e-3 as a string, since it has no decimal point.
    return {name: float(value) if _EXPONENT.fullmatch(str(value)) else value for name, value in found.items()}


def resolve(method: str, options: dict[str, Any], source: str = "training options") -> TrainingConfig:
    """The configuration of a run: the defaults, then the method's recipe, then the user's options.

    Raises:
        ConfigError, InvalidInput: an unknown or nonsensical option.
    """
    return from_mapping(TrainingConfig, recipe(method) | options, source)
