"""Reports: figures with intervals, by category and overall, as a record and as a page."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa.data.prompt_sets import OVERALL, Question
from medusa.evaluation.measurement import Estimate, Measurement, estimate, overhead
from medusa.evaluation.page import Block, Page, Plot, Table
from medusa.evaluation.quality import LIKELIHOOD, Scorer, repeated_ngrams
from medusa.runs.files import write_json, write_text
from medusa.runs.plotting import can_plot

PLAIN, GENERATE = "plain", "generate"

Figures = dict[str, Any]
ByDecoder = dict[str, dict[str, Figures]]  # decoder, category (`overall` first) -> figures


def summarise(
    measured: dict[str, Measurement],  # by decoder, an item per question
    questions: Sequence[Question],
    exact: Collection[str],
    scorer: Scorer | None = None,
) -> ByDecoder:
    """Figures by decoder and category, `overall` first.

    Args:
        exact: decoders whose answers should be those of plain decoding; sampled, decoders other than ours draw differently.
        scorer: adds quality figures.
    """
    categories = {OVERALL: list(range(len(questions)))}
    for number, question in enumerate(questions):
        categories.setdefault(question.category, []).append(number)
    found: ByDecoder = {name: {} for name in measured}
    for category, numbers in categories.items():
        asked = [questions[number] for number in numbers]
        here = {name: Measurement([each.items[number] for number in numbers]) for name, each in measured.items()}
        for name, each in here.items():
            figures = _figures(each, here.get(PLAIN), here.get(GENERATE))
            if PLAIN in here and name in exact:
                same = [a == b for a, b in zip(each.outputs, here[PLAIN].outputs, strict=True)]
                figures["identical_to_plain"] = sum(same) / len(same)
            if scorer is not None:
                figures["quality"] = scorer(asked, each.outputs)
                if PLAIN in here:
                    plain = scorer(asked, here[PLAIN].outputs)
                    figures["log_likelihood_vs_plain"] = figures["quality"][LIKELIHOOD] - plain[LIKELIHOOD]
            found[name][category] = figures
    return found


def _figures(measured: Measurement, plain: Measurement | None, generate: Measurement | None) -> Figures:
    rows = [row for rows in measured.outputs for row in rows]
    total = measured.totals()
    found: Figures = {
        "questions": len(measured.items),
        "answers": len(rows),
        "tokens": int(total.tokens),
        "steps": int(total.row_steps),
        "tokens_per_second": estimate(lambda t: t.tokens_per_second, measured)._asdict(),
        "decode_tokens_per_second": estimate(lambda t: t.decode_tokens_per_second, measured)._asdict(),
        "acceleration_rate": estimate(lambda t: t.acceleration_rate, measured)._asdict(),
        "acceptance_lengths": {str(length): steps for length, steps in sorted(measured.lengths.items())},
        "time_to_first_token": measured.first_seconds,
        "peak_bytes": measured.peak_bytes,
        "repeated_8grams": sum(map(repeated_ngrams, rows)) / len(rows),
    }
    if plain is not None:
        found["overhead"] = estimate(overhead, measured, plain)._asdict()
    for name, base in ((PLAIN, plain), (GENERATE, generate)):
        if base is not None:
            ratio = estimate(lambda a, b: a.tokens_per_second / b.tokens_per_second, measured, base)
            found[f"speedup_vs_{name}"] = ratio._asdict()
    return found


@dataclass(frozen=True)
class Column:
    """A column of a report."""

    value: Callable[[Figures], Any]  # a number, a figure with its interval, or None if the figures have no such value
    form: str = ".2f"  # format of a number
    scale: float = 1.0
    unit: str = ""

    def text(self, figures: Figures) -> str:
        value = self.value(figures)
        if value is None:
            return ""
        return interval_text(value, self.form) if isinstance(value, dict) else f"{self.scale * value:{self.form}}{self.unit}"


def _at(*keys: str) -> Callable[[Figures], Any]:
    """The figure under keys inside one another; None if there is none."""
    return lambda figures: functools.reduce(lambda found, key: found and found.get(key), keys, figures)  # type: ignore


COLUMNS = {
    "tokens/s": Column(_at("tokens_per_second"), ".1f"),
    "decode tokens/s": Column(_at("decode_tokens_per_second"), ".1f"),
    "vs generate": Column(_at("speedup_vs_generate")),
    "vs plain": Column(_at("speedup_vs_plain")),
    "tokens per step": Column(_at("acceleration_rate")),
    "overhead": Column(_at("overhead")),
    "first token": Column(_at("time_to_first_token"), ".0f", 1000, " ms"),
    "peak": Column(_at("peak_bytes"), ".0f", 2**-20, " MiB"),
    "identical": Column(_at("identical_to_plain"), ".0%"),
    "repeated 8-grams": Column(_at("repeated_8grams"), ".0%"),
    "nats per token": Column(_at("quality", LIKELIHOOD), ".3f"),
    "nats beyond plain": Column(_at("log_likelihood_vs_plain"), "+.3f"),
    "distinct-2": Column(_at("quality", "distinct_2")),
    "compiles": Column(_at("quality", "code_that_compiles"), ".0%"),
}
SPEED_COLUMNS = ("tokens/s", "vs generate", "vs plain", "tokens per step", "overhead", "identical")


def interval_text(figure: dict[str, float | None] | Estimate, form: str = ".2f") -> str:
    """A figure and its interval as text.

    >>> interval_text({"value": 2.0, "low": 1.9, "high": 2.1}, ".1f")
    '2.0 (1.9-2.1)'
    """
    value, low, high = figure if isinstance(figure, Estimate) else Estimate(**figure)  # type: ignore[arg-type]
    return f"{value:{form}}" if low is None else f"{value:{form}} ({low:{form}}-{high:{form}})"


def figures_table(found: ByDecoder, category: str, titles: Collection[str] = tuple(COLUMNS)) -> Table:
    """The table of a category, a row per decoder; columns without values are left out."""
    columns = {title: [COLUMNS[title].text(figures[category]) for figures in found.values()] for title in titles}
    columns = {title: column for title, column in columns.items() if any(column)}
    return Table(["decoder", *columns], [list(row) for row in zip(found, *columns.values(), strict=True)])


def shown_categories(found: ByDecoder) -> list[str]:
    """The categories, `overall` first; `overall` alone if there is only one other."""
    categories = list(next(iter(found.values())))
    return categories if len(categories) > 2 else [OVERALL]


def circumstances(record: dict[str, Any]) -> str:
    """How the figures of a record were measured."""
    made = record["made_with"]
    return (
        f"batch 1, {made['dtype']}, {record['rounds']} round(s), {made['device']}, {made['threads']} threads"
        f"{', ours compiled' if made['compile'] else ''}. Intervals: 95 %, bootstrap over questions; ratios are paired.\n"
        "Overhead and decode tokens/s exclude the prefill; tokens/s and speedup include it."
    )


def bench_page(record: dict[str, Any]) -> Page:  # the object of `results.json`
    """The page of a bench: speeds and speedups by category (paper Figures 3 and 8), tables, tokens per step."""
    made, found = record["made_with"], record["decoders"]
    first = next(iter(found.values()))
    blocks: list[Block] = [
        f"{first[OVERALL]['questions']} questions, at most {made['max_new_tokens']} new tokens per answer, "
        f"{'greedy' if not made['temperature'] else 'sampled at ' + str(made['temperature'])}, {circumstances(record)}"
    ]
    if can_plot():
        from medusa.evaluation.plots import speed_plots

        blocks += [Plot(svg) for svg in speed_plots(found)]
    for category in shown_categories(found):
        if category != OVERALL:
            blocks.append(f"## {category} ({first[category]['questions']} questions)")
        blocks.append(figures_table(found, category))
    blocks.append("## Tokens per step")
    if can_plot():
        from medusa.evaluation.plots import lengths_plot

        blocks.append(Plot(lengths_plot(found)))
    blocks.append(_lengths_table(found))
    if record["left_out"]:
        blocks.append(f"Left out, since their prompts do not fit the context: {', '.join(record['left_out'])}.")
    return Page(f"{made['model']} on {made['prompts']}", blocks, {**made, "rounds": record["rounds"]})


def _lengths_table(found: ByDecoder) -> Table:
    """The number of steps by the number of tokens emitted."""
    counts = {name: categories[OVERALL]["acceptance_lengths"] for name, categories in found.items()}
    lengths = [str(length) for length in range(1, 1 + max(int(length) for each in counts.values() for length in each))]
    return Table(["decoder", *lengths], [[name, *(str(each.get(n, 0)) for n in lengths)] for name, each in counts.items()])


def save_report(record: dict[str, Any], page: Page, folder: Path) -> None:
    """Write `results.json`, `results.md` and `results.html`."""
    write_json(folder / "results.json", json.loads(json.dumps(record)))
    write_text(folder / "results.md", page.to_markdown())
    write_text(folder / "results.html", page.to_html())
