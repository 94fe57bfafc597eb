"""`medusa.tune`: the command as a function, from a model by name to the tree that is fastest on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa.checkpoints import named
from medusa.config import from_mapping, integer
from medusa.data.prompt_sets import Prompter, calibration_ids, default_prompts, read_questions
from medusa.errors import InvalidInput
from medusa.model import MedusaModel
from medusa.runs.files import write_json
from medusa.runs.plotting import can_plot
from medusa.runs.provenance import made_by
from medusa.trees.calibration import CALIBRATION_FILE, Calibration
from medusa.trees.files import Tree, TreeChoice, save_tree
from medusa.tuning.choice import NEAR, Choices, choose_trees
from medusa.tuning.config import TuningConfig
from medusa.tuning.options import Trees, copied_nodes
from medusa.tuning.plots import draw_calibration, draw_choices
from medusa.tuning.recording import Recorded, record
from medusa.tuning.timing import room_to_time, time_steps

TUNING_FILE = "tuning.json"


@dataclass(frozen=True)
class Tuned:
    """The result of a tuning."""

    tree: Tree  # the chosen one, or one for each batch size; the root alone if no tree pays
    choices: Choices  # all options that were timed
    calibration: Calibration  # how often the heads' guesses were right
    texts: int  # number of recorded texts
    temperature: float
    made_with: dict[str, Any] = field(repr=False)  # model, machine and settings

    def to_dict(self) -> dict[str, Any]:
        """The object of `tuning.json`."""
        return {
            "tree": self.tree.to_dict(),
            **self.choices.to_dict(),
            "calibration": {
                "accuracies": self.calibration.accuracies,
                "positions": self.calibration.positions,
                "texts": self.texts,
                "temperature": self.temperature,
            },
            "made_with": self.made_with,
        }

    def save(self, path: Path) -> None:
        """Write the tree file, and beside it `calibration.json`, `tuning.json` and, with matplotlib, their plots."""
        save_tree(self.tree, path)
        self.calibration.save(path.parent / CALIBRATION_FILE, self.made_with)
        write_json(path.parent / TUNING_FILE, self.to_dict())
        if can_plot():
            draw_choices(self.choices, path.parent / "tuning.png")
            draw_calibration(self.calibration, path.parent / "calibration.png")


def tune(
    model: str = "embedded",
    prompts: str | None = None,
    output: str | Path | None = None,
    *,
    heads: str | None = None,
    limit: int = 64,
    prompt_tokens: int = 256,
    dtype: str | None = None,
    device: str | None = None,
    quantization: str = "none",
    trust_remote_code: bool = False,
    **options: Any,
) -> Tuned:
    """Choose the tree with the most tokens per second on this machine: record, replay, time (paper 2.3.3, 2.2.3).

        tuned = medusa.tune("smollm2", prompts="chats.jsonl", output="heads/medusa_tree.json", nodes=(8, 16, 32))
        print(tuned.tree, tuned.choices.chosen[1].name)

    Progress goes to stderr. For a loaded model there is `medusa.tuning.verbs.tune_model`.

    Args:
        model: a folder, GGUF file, hub id, `smollm2` or `embedded`.
        prompts: prompts like those to come: a set, file, folder or hub id; None: the embedded model's calibration prompts.
        output: tree file to write; `calibration.json`, `tuning.json` and `recorded/` go beside it. If interrupted, call
            it again to resume.
        heads: folder or hub id of the heads; None: those beside the backbone.
        limit: greatest number of prompts.
        prompt_tokens: tokens used of each text; conversations are not cut.
        dtype, device, quantization, trust_remote_code: as in `medusa.train`.
        options: fields of `TuningConfig`, such as `batches=(1, 8)` or `temperature=0.7`.

    Raises:
        MedusaError: an option, file or model cannot be used, before anything is loaded where that can be known.
    """
    config = from_mapping(TuningConfig, options, "tuning options")
    limit, prompt_tokens = integer("limit", limit, 1), integer("prompt_tokens", prompt_tokens, 1)
    source = default_prompts(model, prompts)
    named.require_heads(model, heads)
    questions = None if prompts is None else read_questions(source)
    if questions is not None and len(questions) == 1:
        raise InvalidInput(f"{prompts} holds one prompt, expected at least two: one to choose trees, one to evaluate them")
    medusa = named.load_model(model, heads, None, dtype, device, trust_remote_code, quantization)
    tokenizer = named.load_tokenizer(model, trust_remote_code)
    room = None if medusa.max_length is None else medusa.max_length - config.max_new_tokens - medusa.num_heads
    chosen = calibration_ids(questions, Prompter(tokenizer, medusa.eos_token_ids), limit, prompt_tokens, room)
    return tune_model(medusa, chosen, output, config, source if questions is not None else "held out")


def tune_model(
    model: MedusaModel,
    prompts: Sequence[Tensor],  # each (P,) long
    output: str | Path | None = None,
    config: TuningConfig | None = None,
    source: str = "",
) -> Tuned:
    """Tune a loaded model; see `tune`.

    Args:
        source: name of the prompts, for the record.

    Raises:
        InvalidInput: a context without room for timing, fewer than two texts, or an output made with something else.
    """
    config = config or TuningConfig()
    path = None if output is None else Path(output)
    room = _check_room(model, config)
    asked = config.max_new_tokens, config.ranks, config.temperature
    folder = None if path is None else path.parent / "recorded"
    texts = record(model, prompts, *asked, batch_size=config.batch_size, folder=folder)
    trees = Trees(texts)
    trees.search(config.kinds, config.nodes)
    usual = int(statistics.median(text.start + 1 for text in texts))  # or less, if timing needs the room
    if model.max_length is not None:
        usual = max(1, min(usual, model.max_length - room))
    timer = _Timer(model, texts, config, config.contexts or (usual,))
    slower = NEAR if config.compile and model.device.type == "cpu" else math.inf
    choices = choose_trees(trees, timer, config.kinds, config.nodes, sorted(config.batches), config.always, slower)
    picked = {batch: option.tree for batch, option in choices.chosen.items()}
    tree: Tree = picked[min(picked)] if len(set(picked.values())) == 1 else TreeChoice(picked)
    made_with = {"prompts": source, "contexts": list(timer.contexts), "compile": config.compile, **made_by(model)}
    tuned = Tuned(tree, choices, Calibration.of(texts), len(texts), config.temperature, made_with)
    if path is not None:
        tuned.save(path)
    return tuned


@dataclass(frozen=True)
class _Timer:
    """Seconds of a step after recorded text, the mean over context lengths."""

    model: MedusaModel
    texts: list[Recorded]
    config: TuningConfig
    contexts: tuple[int, ...]

    def __call__(self, trees: Sequence[Any], batch: int) -> list[float]:
        temperature = self.config.temperature
        options: dict[str, Any] = {"rounds": self.config.rounds, "compile": self.config.compile}
        if temperature:
            options |= {"do_sample": True, "temperature": temperature, "seed": 0}
        seconds = [time_steps(self.model, trees, self._rows(batch, length), **options) for length in self.contexts]
        return [statistics.fmean(each) for each in zip(*seconds, strict=True)]

    def _rows(self, batch: int, length: int) -> Tensor:
        """(batch, length) long of recorded text, repeated if there is too little."""
        ids = torch.cat([text.ids for text in self.texts])
        return ids.repeat(-(-batch * length // len(ids)))[: batch * length].view(batch, length)


def _check_room(model: MedusaModel, config: TuningConfig) -> int:
    """The number of tokens that timing adds to a context; refuses contexts without room for them."""
    copied = max(copied_nodes(kind, size) for kind in config.kinds for size in config.nodes)
    room = room_to_time(model.num_heads, max(model.num_heads, copied))
    asked = max(config.contexts, default=1)
    if model.max_length is not None and asked + room > model.max_length:
        longest = model.max_length - room
        raise InvalidInput(f"--context is {asked}, expected at most {longest}: timing adds {room} tokens to it")
    return room
