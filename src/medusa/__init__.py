"""Medusa: any Hugging Face causal language model, faster, with no draft model and no change to its output."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa.config import MedusaConfig
    from medusa.evaluation.grading import judge
    from medusa.evaluation.verbs import bench, experiment
    from medusa.heads import MedusaHeads
    from medusa.model import MedusaModel
    from medusa.processors.grammar import Grammar
    from medusa.training.verbs import distill, train
    from medusa.trees.static import MedusaTree
    from medusa.tuning.verbs import tune

__version__ = "0.1.0"
__all__ = [
    "EMBEDDED",
    "DynamicTree",
    "Grammar",
    "MedusaConfig",
    "MedusaHeads",
    "MedusaModel",
    "MedusaTree",
    "__version__",
    "bench",
    "distill",
    "experiment",
    "judge",
    "load_tree",
    "train",
    "tune",
]

EMBEDDED = Path(__file__).parent / "assets" / "pycode-16m"
"""The folder of the embedded model: backbone, tokenizer, heads and tree; transformers' Auto classes load it too."""

_HOMES = {
    "Grammar": "medusa.processors.grammar",
    "MedusaConfig": "medusa.config",
    "MedusaHeads": "medusa.heads",
    "MedusaModel": "medusa.model",
    "DynamicTree": "medusa.trees.dynamic",
    "MedusaTree": "medusa.trees.static",
    "load_tree": "medusa.trees.files",
    "bench": "medusa.evaluation.verbs",
    "distill": "medusa.training.verbs",
    "experiment": "medusa.evaluation.verbs",
    "judge": "medusa.evaluation.grading",
    "train": "medusa.training.verbs",
    "tune": "medusa.tuning.verbs",
}


def __getattr__(name: str):
    # Imported on first use, so that `medusa --help` does not wait for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'medusa' has no attribute {name!r}")
