"""Measuring: trees for this machine, exactness in float32, and every decoder against transformers' generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from end_to_end.heads import MEDUSA_1, MEDUSA_2
from end_to_end.pretraining import BACKBONE, text_loss
from end_to_end.source import held_out_prompts
from end_to_end.work import Work
from medusa import MedusaModel, MedusaTree
from medusa.errors import MedusaError
from medusa.evaluation.decoders import Decoded, Decoder, MedusaDecoder, TransformersDecoder
from medusa.evaluation.measurement import Measurement, compare_decoders, estimate, in_turn, overhead, time_run
from medusa.evaluation.quality import repeated_ngrams
from medusa.runs.records import Journal
from medusa.trees.calibration import Calibration
from medusa.trees.files import Tree, load_tree, save_tree
from medusa.tuning.recording import record
from medusa.tuning.replay import fit_dynamic_tree, fit_static_tree

PLAIN, GENERATE = "plain", "generate"
TEMPERATURE = 0.8
STEP_PROMPTS, EXACT_PROMPTS = 4, 8
FITTED_TEXTS = 24  # a processor takes half a second for each
COMPILING = 150.0  # seconds that several graphs may take
A_MINUTE = 60.0
RUNS = "bench.jsonl"


@cache
def load(folder: Path, name: str, dtype: torch.dtype, device: torch.device) -> MedusaModel:
    """Backbone with the heads of a name; one object a process, since what was compiled belongs to it."""
    return MedusaModel.from_pretrained(
        folder / BACKBONE, heads=folder / name, tree=MedusaTree([]), dtype=dtype, device_map=str(device)
    )


def medusa_model(work: Work, name: str, dtype: torch.dtype | None = None) -> MedusaModel:
    return load(work.folder, name, dtype or work.dtype, work.device)


def calibrate(work: Work, name: str, prompts: Sequence[Tensor]) -> dict[str, Any]:
    """How often the heads are right on these prompts, with their trees of every size saved: the best static ones, and the
    dynamic ones fitted to the same texts."""
    texts = record(medusa_model(work, name), prompts, work.size.new, batch_size=32, folder=work.folder / f"{name}.recorded")
    calibration, dynamic = Calibration.of(texts), fit_dynamic_tree(texts[:FITTED_TEXTS])
    for nodes in {1, *work.size.nodes, *work.size.compiled_nodes}:
        save_tree(fit_static_tree(texts, nodes), tree_file(work, name, "static", nodes))
        if nodes > 1:
            save_tree(dataclasses.replace(dynamic, num_nodes=nodes), tree_file(work, name, "dynamic", nodes))
    return {"accuracies": calibration.accuracies, "positions": calibration.positions}


def tree_file(work: Work, name: str, kind: str, nodes: int) -> Path:
    return work.folder / f"{name}.{kind}-{nodes}.json"


def trees(work: Work, name: str, nodes: int) -> dict[str, Tree]:
    """What the heads are benched with."""
    return {kind: load_tree(tree_file(work, name, kind, nodes)) for kind in ("static", "dynamic")}


def tuning(work: Work) -> dict[str, Any]:
    """The stage: calibration of both heads, and the tree size that is fastest on this machine, compiled and not."""
    size = work.size
    prompts = held_out_prompts(work, "calibration", size.calibration_prompts)
    for name in (MEDUSA_1, MEDUSA_2):
        if work.read(f"{name}.calibration.json") is None:
            work.room(A_MINUTE)
            work.write(f"{name}.calibration.json", calibrate(work, name, prompts))
    steps = {}
    for mode, nodes in {"as it comes": size.nodes, "compiled": size.compiled_nodes}.items():
        file = f"step-cost-{mode.replace(' ', '-')}.json"
        if nodes and work.read(file) is None:
            work.room(A_MINUTE if mode == "as it comes" else COMPILING)
            work.write(file, step_cost(work, nodes, prompts[:STEP_PROMPTS], mode == "compiled"))
        steps[mode] = work.read(file) or []
    return {
        "prompts": len(prompts),
        "accuracies": {n: work.read(f"{n}.calibration.json")["accuracies"] for n in (MEDUSA_1, MEDUSA_2)},
        "steps": steps,
        "chosen_nodes": {mode: best_size(rows) for mode, rows in steps.items() if rows},
    }


def step_cost(work: Work, sizes: Sequence[int], prompts: Sequence[Tensor], compiled: bool) -> list[dict[str, Any]]:
    """What a step costs and gains with Medusa-1's static tree of each size, measured in turn."""
    decoders: dict[str, Decoder] = {
        str(nodes): MedusaDecoder(
            medusa_model(work, MEDUSA_1), work.size.new, load_tree(tree_file(work, MEDUSA_1, "static", nodes)), compile=compiled
        )
        for nodes in sizes
    }
    results = compare_decoders(decoders, [prompt[None] for prompt in prompts])
    plain = results["1"].totals()
    return [
        {
            "nodes": nodes,
            "milliseconds": 1e3 * float(measured.totals().step_seconds),
            "overhead": float(overhead(measured.totals(), plain)),
            "acceleration_rate": measured.acceleration_rate,
            "tokens_per_second": measured.tokens_per_second,
        }
        for nodes, measured in zip(sizes, results.values(), strict=True)
    ]


def best_size(rows: Sequence[dict[str, Any]]) -> int:
    """The fastest size of tree; the best of those with heads, which are to be measured even where none pays."""
    return max((row for row in rows if row["nodes"] > 1), key=lambda row: row["tokens_per_second"])["nodes"]


def exactness(work: Work) -> dict[str, Any]:
    """The stage: in float32, do plain and Medusa decoding say what transformers' generate says; and each backbone's loss."""
    prompts = held_out_prompts(work, "test", EXACT_PROMPTS)
    nodes = max(work.read("tuning.json")["chosen_nodes"].values())
    found: dict[str, Any] = {}
    for name in (MEDUSA_1, MEDUSA_2):
        file = f"{name}.exactness.json"
        if work.read(file) is None:
            work.room(A_MINUTE)
            model = medusa_model(work, name, torch.float32)
            decoders: dict[str, Decoder] = {GENERATE: TransformersDecoder(model, work.size.new)}
            kinds = {PLAIN: MedusaTree([]), **trees(work, name, nodes)}
            decoders |= {kind: MedusaDecoder(model, work.size.new, tree) for kind, tree in kinds.items()}
            results = compare_decoders(decoders, [prompt[None] for prompt in prompts], warmup=0)
            same = {kind: identical(results[kind], results[GENERATE]) for kind in kinds}
            loss = text_loss(medusa_model(work, name).backbone, work)
            work.write(file, {"identical": same, "prompts": len(prompts), "held_out_loss": loss})
        found[name] = work.read(file)
    return found


def identical(measured: Measurement, wanted: Measurement) -> float:
    """The share of prompts with the same output."""
    return sum(a == b for a, b in zip(measured.outputs, wanted.outputs, strict=True)) / len(wanted.items)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One comparison."""

    temperature: float
    compiled: bool

    @property
    def name(self) -> str:
        kind = f"sampled at {self.temperature}" if self.temperature else "greedy"
        return f"{kind}, our loops compiled" if self.compiled else kind


def settings(work: Work) -> list[Setting]:
    modes = (False, True) if work.size.compiled_nodes else (False,)
    return [Setting(temperature, compiled) for compiled in modes for temperature in (0.0, TEMPERATURE)]


def decoders_of(work: Work, setting: Setting) -> dict[str, Decoder]:
    """generate as it comes, our plain loop, and both heads with both kinds of tree at the size chosen."""
    new, sampled = work.size.new, setting.temperature > 0
    nodes = work.read("tuning.json")["chosen_nodes"]["compiled" if setting.compiled else "as it comes"]
    theirs: dict[str, Any] = {"do_sample": True, "temperature": setting.temperature, "top_k": 0} if sampled else {}
    ours: dict[str, Any] = {"do_sample": True, "temperature": setting.temperature, "seed": 1} if sampled else {}
    ours["compile"] = setting.compiled
    original = medusa_model(work, MEDUSA_1)
    found: dict[str, Decoder] = {} if setting.compiled else {GENERATE: TransformersDecoder(original, new, **theirs)}
    found[PLAIN] = MedusaDecoder(original, new, MedusaTree([]), **ours)
    for name in (MEDUSA_1, MEDUSA_2):
        for kind, tree in trees(work, name, nodes).items():
            found[f"{name}, {kind}"] = MedusaDecoder(medusa_model(work, name), new, tree, **ours)
    return found


def bench(work: Work) -> dict[str, Any]:
    """The stage: prompt after prompt, every decoder in turn in every setting, for as long as there is time.

    A decoder that fails is left out, and what it said is kept: the others are not to be lost with it.
    """
    prompts = held_out_prompts(work, "test", work.size.bench_prompts[1])
    least, compiling = work.size.bench_prompts[0], COMPILING if work.size.compiled_nodes else 0.0
    journal = Journal(work.folder / RUNS, "run of the bench")
    decoders = {setting: decoders_of(work, setting) for setting in settings(work)}
    failed: dict[tuple[Setting, str], str] = {}
    warm: set[tuple[Setting, str]] = set()
    seconds = 0.0
    for number, prompt in enumerate(prompts):
        left = [(s, name) for s, name in _runs(decoders, number) if _id(number, s, name) not in journal.records]
        if not left:
            continue
        if number >= least and work.left_of_stage() < seconds:
            break
        work.room(max(1.5 * seconds, 0.0 if warm else compiling))
        began = work.now()
        for setting, name in left:
            decoder, ids = decoders[setting][name], prompt[None]
            try:
                if (setting, name) not in warm:
                    time_run(decoder, ids)
                    warm.add((setting, name))
                    began = work.now()
                journal.add({"id": _id(number, setting, name), **dataclasses.asdict(time_run(decoder, ids))})
            except (RuntimeError, MedusaError) as error:
                if name == GENERATE:  # then it is the machine, or there is nothing to compare with
                    raise
                failed[setting, name] = str(error).strip().splitlines()[0][:200]
                del decoders[setting][name]
        seconds = work.now() - began
    failures = {f"{setting.name}, {name}": error for (setting, name), error in failed.items()}
    return {**figures(journal, {s: list(d) for s, d in decoders.items()}, len(prompts)), "failed": failures}


def _runs(decoders: dict[Setting, dict[str, Decoder]], number: int) -> Iterator[tuple[Setting, str]]:
    for setting, named in decoders.items():
        for name in in_turn(list(named), number):
            yield setting, name


def _id(number: int, setting: Setting, name: str) -> str:
    return f"{number}/{setting.name}/{name}"


def figures(journal: Journal, names: dict[Setting, list[str]], prompts: int) -> dict[str, Any]:
    """A row for every decoder in every setting, over the prompts that all have answered."""
    fields = [field.name for field in dataclasses.fields(Decoded)]
    whole = [
        number
        for number in range(prompts)
        if all(_id(number, setting, name) in journal.records for setting, found in names.items() for name in found)
    ]

    def measured(setting: Setting, name: str) -> Measurement:
        runs = (journal.records[_id(number, setting, name)] for number in whole)
        return Measurement([[Decoded(**{field: run[field] for field in fields})] for run in runs])

    rows = []
    for setting, found in names.items():
        if PLAIN not in found or not whole:
            continue
        generate = measured(dataclasses.replace(setting, compiled=False), GENERATE)
        plain = measured(setting, PLAIN)
        for name in found:
            one = measured(setting, name)
            outputs = [output for item in one.outputs for output in item]
            rows.append(
                {
                    "setting": setting.name,
                    "decoder": name,
                    "tokens_per_second": estimate(lambda t: t.tokens_per_second, one),
                    "against_generate": estimate(_ratio, one, generate),
                    "against_plain": estimate(_ratio, one, plain),
                    "acceleration_rate": estimate(lambda t: t.acceleration_rate, one),
                    "overhead": estimate(overhead, one, plain),
                    # Medusa-2's backbone is another, and generate draws from another stream.
                    "identical_to_plain": None
                    if MEDUSA_2 in name or (name == GENERATE and setting.temperature)
                    else identical(one, plain),
                    "repeated_8grams": sum(map(repeated_ngrams, outputs)) / len(outputs),
                    "first_milliseconds": 1e3 * one.first_seconds,
                    "peak_bytes": one.peak_bytes,
                }
            )
    return {"prompts": len(whole), "rows": rows}


def _ratio(a: Any, b: Any) -> Tensor:
    return a.tokens_per_second / b.tokens_per_second
