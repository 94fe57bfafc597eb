"""The report of a bench: figures with intervals, per category and overall, as a record and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from medusa.data.prompt_sets import OVERALL, Question
from medusa.evaluation.answers import Scorer
from medusa.evaluation.measurement import Estimate, Measurement, estimate, overhead
from medusa.evaluation.quality import repeated_ngrams

PLAIN, GENERATE = "plain", "generate"
LIKELIHOOD = "log_likelihood_per_token"


def summarise(
    measured: dict[str, Measurement],  # by decoder, an item per question
    questions: Sequence[Question],
    comparable: Collection[str],
    scorer: Scorer | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by decoder and category, `overall` first.

    Args:
        comparable: decoders that would say what the plain loop says, were they exact; sampled, others draw otherwise.
        scorer: quality figures too.
    """
    parts = {OVERALL: list(range(len(questions)))}
    for number, question in enumerate(questions):
        parts.setdefault(question.category, []).append(number)
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in measured}
    for part, numbers in parts.items():
        asked = [questions[number] for number in numbers]
        here = {name: Measurement([each.items[number] for number in numbers]) for name, each in measured.items()}
        for name, each in here.items():
            figures = _figures(each, here.get(PLAIN), here.get(GENERATE))
            if PLAIN in here and name in comparable:
                same = [a == b for a, b in zip(each.outputs, here[PLAIN].outputs, strict=True)]
                figures["identical_to_plain"] = sum(same) / len(same)
            if scorer is not None:
                figures["quality"] = scorer(asked, each.outputs)
                if PLAIN in here:
                    plain = scorer(asked, here[PLAIN].outputs)
                    figures["log_likelihood_vs_plain"] = figures["quality"][LIKELIHOOD] - plain[LIKELIHOOD]
            found[name][part] = figures
    return found


def _figures(measured: Measurement, plain: Measurement | None, generate: Measurement | None) -> dict[str, Any]:
    rows = [row for rows in measured.outputs for row in rows]
    total = measured.totals()
    found = {
        "questions": len(measured.items),
        "answers": len(rows),
        "tokens": int(total.tokens),
        "steps": int(total.row_steps),
        "tokens_per_second": _told(estimate(lambda t: t.tokens_per_second, measured)),
        "decode_tokens_per_second": _told(estimate(lambda t: t.decode_tokens_per_second, measured)),
        "acceleration_rate": _told(estimate(lambda t: t.acceleration_rate, measured)),
        "acceptance_lengths": {str(length): steps for length, steps in sorted(measured.lengths.items())},
        "time_to_first_token": measured.first_seconds,
        "peak_bytes": measured.peak_bytes,
        "repeated_8grams": sum(map(repeated_ngrams, rows)) / len(rows),
    }
    if plain is not None:
        found["overhead"] = _told(estimate(overhead, measured, plain))
    for name, base in ((PLAIN, plain), (GENERATE, generate)):
        if base is not None:
            ratio = estimate(lambda a, b: a.tokens_per_second / b.tokens_per_second, measured, base)
            found[f"speedup_vs_{name}"] = _told(ratio)
    return found


def _told(figure: Estimate) -> dict[str, float | None]:
    return figure._asdict()


def markdown(record: dict[str, Any]) -> str:
    """The report as a page of tables.

    Args:
        record: the object of `results.json`.
    """
    made, found = record["made_with"], record["decoders"]
    first = next(iter(found.values()))
    lines = [
        f"# {made['model']} on {made['prompts']}",
        "",
        f"{first[OVERALL]['questions']} questions, at most {made['max_new_tokens']} new tokens an answer, "
        f"{'greedy' if not made['temperature'] else 'sampled at ' + str(made['temperature'])}, {circumstances(record)}",
        "",
        *table(*cells(found, OVERALL)),
    ]
    for category in [part for part in first if part != OVERALL]:
        if len(first) > 2:
            lines += ["", f"## {category} ({first[category]['questions']} questions)", "", *table(*cells(found, category))]
    lines += ["", "## Tokens a step", ""]
    longest = max(int(length) for parts in found.values() for length in parts[OVERALL]["acceptance_lengths"])
    lines += table(["decoder", *map(str, range(1, longest + 1))], [_histogram(n, found[n][OVERALL], longest) for n in found])
    if record["left_out"]:
        lines += ["", f"Left out, their prompts not fitting the context: {', '.join(record['left_out'])}."]
    return "\n".join(lines) + "\n"


def circumstances(record: dict[str, Any]) -> str:
    """How a record's figures were measured, in words."""
    made = record["made_with"]
    return (
        f"batch 1, {made['dtype']}, {record['rounds']} round(s), {made['device']}, {made['threads']} threads"
        f"{', ours compiled' if made['compile'] else ''}. Intervals: 95 %, bootstrap over questions; ratios are paired.\n"
        "Overhead and decode tokens/s leave the prefill out; tokens/s and speedup do not."
    )


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda f: told(f["tokens_per_second"], 1),
    "decode tokens/s": lambda f: told(f["decode_tokens_per_second"], 1),
    "vs generate": lambda f: told(f.get("speedup_vs_generate")),
    "vs plain": lambda f: told(f.get("speedup_vs_plain")),
    "tokens a step": lambda f: told(f["acceleration_rate"]),
    "overhead": lambda f: told(f.get("overhead")),
    "first token": lambda f: f"{1000 * f['time_to_first_token']:.0f} ms",
    "peak": lambda f: f"{f['peak_bytes'] / 2**20:.0f} MiB" if f["peak_bytes"] else "",
    "identical": lambda f: f"{f['identical_to_plain']:.0%}" if "identical_to_plain" in f else "",
    "repeated 8-grams": lambda f: f"{f['repeated_8grams']:.0%}",
    "nats a token": lambda f: f"{f['quality'][LIKELIHOOD]:.3f}" if "quality" in f else "",
    "nats beyond plain": lambda f: f"{f['log_likelihood_vs_plain']:+.3f}" if "log_likelihood_vs_plain" in f else "",
    "distinct-2": lambda f: f"{f['quality']['distinct_2']:.2f}" if "quality" in f else "",
    "compiles": lambda f: f"{f['quality']['code_that_compiles']:.0%}" if f.get("quality", {}).get("answers_with_code") else "",
}

TERSE = ("tokens/s", "vs generate", "vs plain", "tokens a step", "overhead", "identical")


def told(figure: dict[str, float | None] | None, digits: int = 2) -> str:
    """A figure and its interval in words."""
    if figure is None:
        return ""
    if figure["low"] is None:
        return f"{figure['value']:.{digits}f}"
    return f"{figure['value']:.{digits}f} ({figure['low']:.{digits}f}-{figure['high']:.{digits}f})"


def cells(
    found: dict[str, dict[str, Any]], part: str, titles: Collection[str] = tuple(COLUMNS)
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a part's table; columns that nobody fills are left out."""
    columns = {title: [COLUMNS[title](parts[part]) for parts in found.values()] for title in titles}
    columns = {title: column for title, column in columns.items() if any(column)}
    return ["decoder", *columns], [list(row) for row in zip(found, *columns.values(), strict=True)]


def _histogram(name: str, figures: dict[str, Any], longest: int) -> list[str]:
    return [name, *(str(figures["acceptance_lengths"].get(str(length), 0)) for length in range(1, longest + 1))]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in [header, rule, *rows]]
