"""Training options, and the named recipes that set them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from medusa.config import HeadsKind, Quantization, check_options, from_mapping, option
from medusa.errors import ConfigError, InvalidInput
from medusa.runs.files import read_yaml

_EXPONENT = re.compile(r"\d+[eE][-+]?\d+")
METHOD = "medusa-1"  # the default
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class TrainingConfig:
    """Every option of a training run. The defaults are those of the paper's Medusa-1 (appendix B), except for soft targets."""

    # The heads.
    num_heads: int = option(5, "number of heads, K", above=0)
    num_layers: int = option(1, "residual blocks per head", least=0)
    shared_lm_head: bool = option(False, "train only the residual blocks; the heads predict through the backbone's LM head")
    heads_kind: HeadsKind = option("medusa", "what heads read besides the hidden state: nothing, the root, or the path")
    draft_vocabulary: str = option("all", "tokens that heads score: all, a number, or auto (fewest for 99 % of the text)")
    # Their loss, Eq. 1.
    lambda_base: float = option(0.8, "weight of head k's loss: lambda_base ** k", least=0)
    targets: Literal["soft", "hard"] = option("soft", "what heads learn: the backbone's distribution or the text's token")
    soft_top: int = option(32, "number of tokens of the backbone's distribution that soft targets keep", above=0)
    # The backbone.
    backbone: Literal["frozen", "lora", "full"] = option("frozen", "how the backbone is trained; frozen is Medusa-1")
    quantization: Quantization = option("none", "how the backbone's weights are stored (nf4, int8: bitsandbytes)")
    lm_loss: Literal["labels", "distill"] = option(
        "labels", "loss L_LM: on the text, or KL to the backbone without its adapter"
    )
    lambda_0: float = option(0.2, "weight of the heads' loss (Eq. 1) in Eq. 2", least=0)
    lambda_0_schedule: Literal["constant", "sine"] = option(
        "constant", "schedule of lambda_0; sine: rises from 0 to lambda_0 at the end"
    )
    heads_steps: int = option(0, "number of steps of stage 1, which trains the heads alone; -1: as many as stage 2", least=-1)
    lora_rank: int = option(32, "rank r of the adapter", above=0)
    lora_alpha: int = option(16, "scale alpha of the adapter", above=0)
    lora_dropout: float = option(0.05, "dropout before the adapter", least=0, below=1)
    backbone_learning_rate: float | None = option(
        None, "peak learning rate of the backbone; none: a quarter of the heads'", least=0
    )
    # Data.
    max_length: int = option(2048, "maximum number of tokens in a row", above=0)
    packing: bool = option(False, "put several short samples into one row")
    held_out: float = option(0.01, "share of the rows to evaluate on if no evaluation data is given", least=0, below=1)
    # Optimisation.
    max_steps: int = option(-1, "number of optimiser steps; -1: as many as the epochs take", least=-1)
    epochs: float = option(2.0, "number of passes over the data", above=0)
    batch_size: int = option(8, "number of rows in a batch, per device", above=0)
    gradient_accumulation: int = option(1, "number of batches per optimiser step", above=0)
    learning_rate: float = option(2e-3, "peak learning rate of the heads; cosine to zero after the warmup", above=0)
    warmup_steps: int = option(40, "number of steps of linear warmup", least=0)
    weight_decay: float = option(0.0, "decoupled weight decay, as in AdamW", least=0)
    optimizer: Literal["auto", "adamw", "adamw-8bit"] = option("auto", "auto: 8-bit on a GPU if bitsandbytes is installed")
    gradient_checkpointing: bool = option(False, "recompute the activations of a trained backbone, to save memory")
    loss_chunk: int = option(
        0, "number of rows of logits in memory at a time; 0: at most 1024, and at most 2^26 logits", least=0
    )
    seed: int = option(0, "seed of data order, dropout and new weights", least=0)
    # Logs and files.
    logging_steps: int = option(20, "number of steps between lines of the log", above=0)
    eval_steps: int = option(0, "number of steps between evaluations; 0: only at the end", least=0)
    save_steps: int = option(500, "number of steps between checkpoints", above=0)
    tree_nodes: int = option(64, "size of the tree built from the measured accuracies, the root included", above=0)
    report_to: str = option("none", "tensorboard, wandb or another reporter of transformers' Trainer")

    def __post_init__(self):
        check_options(self)
        tokens = self.draft_vocabulary
        if tokens not in ("all", "auto") and not (tokens.isdecimal() and int(tokens) > 0):
            raise InvalidInput(f"draft_vocabulary is {tokens!r}, expected all, auto or a number of tokens")
        if self.max_steps == 0:
            raise InvalidInput("max_steps is 0, expected -1 or a number of steps")
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
    """The options that a named method sets; ConfigError if there is no such method."""
    path = RECIPES / f"{name}.yaml"
    if name not in recipe_names():
        raise ConfigError(f"no method {name!r}; there are {', '.join(recipe_names())}")
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def read_options(path: Path) -> dict[str, Any]:
    """The `option: value` lines of a user's YAML file; InvalidInput if it cannot be read or holds something else."""
    found = read_yaml(path, InvalidInput) or {}
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds a {type(found).__name__}, expected `option: value` lines")
    # YAML reads 2e-3 as a string, since it has no decimal point.
    return {name: float(value) if _EXPONENT.fullmatch(str(value)) else value for name, value in found.items()}


def resolve(method: str, options: dict[str, Any], source: str = "training options") -> TrainingConfig:
    """The configuration of a run: the defaults, then the method's recipe, then the user's options, which are checked."""
    return from_mapping(TrainingConfig, recipe(method) | options, source)
