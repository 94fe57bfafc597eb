"""The report: what the stages found as one JSON, and as a page of tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from end_to_end.work import Work
from medusa.runs.files import write_text
from medusa.runs.provenance import environment

MOST_PACKAGES = 12


def write_report(work: Work, size_name: str, stages: Sequence[str]) -> list[str]:
    """Write results.json and results.md from what there is; returns the stages that are left."""
    found = {stage: work.read(f"{stage}.json") for stage in stages}
    left = [stage for stage in stages if found[stage] is None]
    record = {
        "environment": environment(work.device),
        "size": size_name,
        "options": dataclasses.asdict(work.size),
        "seconds": work.spent(),
        "left": left,
        "warnings": work.warnings(),
        **{stage: value for stage, value in found.items() if value is not None},
    }
    work.write("results.json", record)
    write_text(work.folder / "results.md", page(record))
    return left


def page(record: dict[str, Any]) -> str:
    machine = record["environment"]
    device = machine.get("gpu", machine["cpu"])
    parts = [f"# {record['size']}, end to end on {device}"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "python", "medusa"))
    seconds = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in record["seconds"].items())
    parts.append(f"{versions}. {seconds}: {sum(record['seconds'].values()) / 60:.1f} minutes.")
    if record["left"]:
        parts.append(f"Not done yet: {', '.join(record['left'])}.")
    if record["warnings"]:
        parts.append("\n".join(f"- {warning}" for warning in record["warnings"]))
    writers = {
        "source": _source,
        "pretraining": _pretraining,
        "continuations": _continuations,
        "medusa-1": _heads,
        "medusa-2": _heads,
        "tuning": _tuning,
        "exactness": _exactness,
        "bench": _bench,
    }
    for stage, write in writers.items():
        if stage in record:
            parts.append(f"## {stage.capitalize()}")
            parts += write(record[stage])
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _source(found: dict[str, Any]) -> list[str]:
    packages = found["packages"]
    rows = [[p["package"], p["licence"].replace("|", "/"), f"{p['characters'] / 1e6:.1f}"] for p in packages[:MOST_PACKAGES]]
    rest = sum(p["characters"] for p in packages[MOST_PACKAGES:])
    if rest:
        rows.append([f"{len(packages) - MOST_PACKAGES} more, in results.json", "", f"{rest / 1e6:.1f}"])
    held_out = ", ".join(f"{number} for {split}" for split, number in found["held_out_files"].items())
    text = f"{found['files']:,} different files, {found['tokens'] / 1e6:.1f} M tokens. "
    text += f"Held out by a hash of their path: {held_out}; they resemble their neighbours, which were trained on."
    return [text, _table(["package", "licence", "M characters"], rows)]


def _pretraining(found: dict[str, Any]) -> list[str]:
    rows = [[f"{step:,}", f"{loss:.3f}"] for step, loss in found["log"][:: max(1, len(found["log"]) // 8)]]
    return [
        f"{found['parameters'] / 1e6:.0f} M parameters, {found['steps']:,} steps, {found['tokens'] / 1e6:.0f} M tokens "
        f"({found['epochs']:.1f} epochs) at {found['tokens_per_second'] / 1e3:.0f} k tokens/s (compiled: {found['compiled']}). "
        f"On held-out files: {found['held_out_loss']:.3f} nats a token, perplexity {math.exp(found['held_out_loss']):.2f}.",
        _table(["step", "loss"], rows),
    ]


def _continuations(found: dict[str, Any]) -> list[str]:
    return [f"{found['rows']:,} continuations, {found['new_tokens'] / 1e6:.2f} M new tokens."]


def _heads(found: dict[str, Any]) -> list[str]:
    ranks = range(1, 6)
    rows = []
    for head in range(1, found["config"]["num_heads"] + 1):
        rows.append([str(head), *(f"{found['metrics'][f'eval_head{head}_top{rank}']:.3f}" for rank in ranks)])
    return [
        f"{found['steps']:,} steps, {found['tokens'] / 1e6:.1f} M tokens. Accuracy on held-out rows:",
        _table(["head", *(f"top-{rank}" for rank in ranks)], rows),
    ]


def _tuning(found: dict[str, Any]) -> list[str]:
    parts = []
    for mode, steps in found["steps"].items():
        if steps:
            rows = [
                [
                    str(row["nodes"]),
                    f"{row['milliseconds']:.2f}",
                    f"{row['overhead']:.2f}",
                    f"{row['acceleration_rate']:.2f}",
                    f"{row['tokens_per_second']:.0f}",
                ]
                for row in steps
            ]
            parts.append(f"A step of Medusa-1 by tree size, {mode}; {found['chosen_nodes'][mode]} nodes chosen:")
            parts.append(_table(["nodes", "ms", "overhead", "tokens a step", "tokens/s"], rows))
    return parts


def _exactness(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, *(f"{share:.0%}" for share in one["identical"].values()), f"{math.exp(one['held_out_loss']):.3f}"]
        for name, one in found.items()
    ]
    first = next(iter(found.values()))
    text = f"Outputs identical to transformers' generate in float32, {first['prompts']} prompts; perplexity of each backbone:"
    return [text, _table(["", *first["identical"], "perplexity"], rows)]


def _bench(found: dict[str, Any]) -> list[str]:
    parts = [f"{found['prompts']} held-out prompts, batch 1, prefill included; with 95 % intervals over prompts."]
    parts += [f"Left out: {name}: {error}" for name, error in found["failed"].items()]
    columns = ["", "tokens/s", "of generate", "of plain", "tokens a step", "overhead", "as plain", "repeated 8-grams"]
    for setting in dict.fromkeys(row["setting"] for row in found["rows"]):
        rows = [
            [
                row["decoder"],
                *(_estimate(row[key]) for key in ("tokens_per_second", "against_generate", "against_plain")),
                *(_estimate(row[key]) for key in ("acceleration_rate", "overhead")),
                "" if row["identical_to_plain"] is None else f"{row['identical_to_plain']:.0%}",
                f"{row['repeated_8grams']:.0%}",
            ]
            for row in found["rows"]
            if row["setting"] == setting
        ]
        parts += [f"### {setting.capitalize()}", _table(columns, rows)]
    return parts


def _estimate(found: Sequence[float | None]) -> str:
    value, low, high = found
    digits = 0 if abs(value or 0) >= 100 else 2
    return f"{value:.{digits}f}" if low is None else f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
