"""How heads are trained: the options, and the named recipes that set them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from medusa.config import from_mapping
from medusa.errors import ConfigError, InvalidInput
from medusa.runs.files import read_yaml

_EXPONENT = re.compile(r"\d+[eE][-+]?\d+")
METHOD = "medusa-1"  # the default
RECIPES = Path(__file__).parent / "recipes"


def _option(default: Any, text: str) -> Any:
    """A field with its one description, which `medusa train --help` shows too."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainingConfig:
    """Every option of a training run. The defaults are the paper's Medusa-1 (appendix B) but for soft targets."""

    # The heads.
    num_heads: int = _option(5, "K")
    num_layers: int = _option(1, "residual blocks per head")
    shared_lm_head: bool = _option(False, "train the residual blocks alone, predict through the backbone's LM head")
    heads_kind: Literal["medusa", "root", "path"] = _option(
        "medusa", "what they read besides the hidden state: nothing, the root, the path"
    )
    draft_vocabulary: str = _option("all", "tokens that heads score: a number, or auto, the fewest that are 99 % of the text")
    # Their loss, Eq. 1.
    lambda_base: float = _option(0.8, "lambda_k = lambda_base ** k")
    targets: Literal["soft", "hard"] = _option("soft", "the backbone's distribution at t + k, or the token of the text")
    soft_top: int = _option(32, "tokens of the backbone's distribution that soft targets keep")
    # The backbone.
    backbone: Literal["frozen", "lora", "full"] = _option("frozen", "what of it is trained; frozen is Medusa-1")
    quantization: Literal["none", "nf4", "int8"] = _option("none", "how its weights are held (bitsandbytes)")
    lm_loss: Literal["labels", "distill"] = _option("labels", "L_LM: on the text, or KL to the backbone without its adapter")
    lambda_0: float = _option(0.2, "weight of Eq. 1 beside L_LM, Eq. 2")
    lambda_0_schedule: Literal["constant", "sine"] = _option("constant", "sine: rising from 0 to lambda_0 at the end")
    heads_steps: int = _option(0, "stage 1: steps in which the heads are trained alone; -1: as many as the joint stage takes")
    lora_rank: int = _option(32, "r of the adapter")
    lora_alpha: int = _option(16, "alpha of the adapter")
    lora_dropout: float = _option(0.05, "dropout before the adapter")
    backbone_learning_rate: float | None = _option(None, "None: a quarter of the heads'")
    # Data.
    max_length: int = _option(2048, "tokens of a row")
    packing: bool = _option(False, "short samples share a row")
    held_out: float = _option(0.01, "share of the rows to measure on where no evaluation data is given")
    # Optimisation.
    max_steps: int = _option(-1, "-1: as many as the epochs take")
    epochs: float = _option(2.0, "passes over the data")
    batch_size: int = _option(8, "rows of a device at a time")
    gradient_accumulation: int = _option(1, "batches to an optimiser step")
    learning_rate: float = _option(2e-3, "of the heads, at its peak; cosine to zero after a linear warmup")
    warmup_steps: int = _option(40, "steps of rising learning rate")
    weight_decay: float = _option(0.0, "decoupled, as in AdamW")
    optimizer: Literal["auto", "adamw", "adamw-8bit"] = _option("auto", "auto: 8-bit on a GPU that has bitsandbytes")
    gradient_checkpointing: bool = _option(False, "of the backbone, where it is trained")
    loss_chunk: int = _option(0, "rows of logits held at a time; 0: at most 1024, and no more than 2^26 logits")
    seed: int = _option(0, "of data order, dropout and new weights")
    # What is said and kept.
    logging_steps: int = _option(20, "steps between lines of the log")
    eval_steps: int = _option(0, "0: at the end")
    save_steps: int = _option(500, "steps between checkpoints")
    tree_nodes: int = _option(64, "of the tree built from the accuracies measured, the root included")
    report_to: str = _option("none", "tensorboard, wandb, …: whatever transformers' Trainer reports to")

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidInput(f"{name} is {value}, expected a number that is finite")
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
        ):
            if not getattr(self, name) >= 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.draft_vocabulary not in ("all", "auto") and not (
            self.draft_vocabulary.isdecimal() and int(self.draft_vocabulary) > 0
        ):
            raise InvalidInput(f"draft_vocabulary is {self.draft_vocabulary!r}, expected all, auto or a number of tokens")
        if self.loss_chunk < 0:
            raise InvalidInput(f"loss_chunk is {self.loss_chunk}, expected at least 0")
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
            raise InvalidInput("heads_steps is for a backbone that is trained; with a frozen one all steps are of the heads")

    def lambdas(self, num_heads: int) -> list[float]:
        """What the loss of each head counts (paper 2.2.1, Eq. 1): lambda_k is the k-th power of a constant."""
        return [self.lambda_base**k for k in range(1, num_heads + 1)]

    @property
    def joint(self) -> bool:
        """Whether the backbone is trained together with the heads (Medusa-2)."""
        return self.backbone != "frozen"


def recipe_names() -> list[str]:
    """The methods that `--method` knows."""
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
        InvalidInput: not to be read, or something else.
    """
    found = read_yaml(path, InvalidInput) or {}
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds a {type(found).__name__}, expected `option: value` lines")
    # YAML takes 2e-3 for a text, since it lacks a point.
    return {name: float(value) if _EXPONENT.fullmatch(str(value)) else value for name, value in found.items()}


def resolve(method: str, options: dict[str, Any], source: str = "training options") -> TrainingConfig:
    """The configuration of a run: the defaults, then the method's recipe, then the user's options.

    Raises:
        ConfigError, InvalidInput: an unknown or nonsensical option.
    """
    return from_mapping(TrainingConfig, recipe(method) | options, source)
