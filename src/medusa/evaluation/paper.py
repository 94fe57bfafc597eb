"""The figures that the paper prints for each experiment, to compare with those measured here."""

from __future__ import annotations

from dataclasses import dataclass

MT_BENCH = "MT-Bench"
WRITING = "MT-Bench's writing and roleplay"


@dataclass(frozen=True)
class Paper:
    """The paper's own setting and figures."""

    setting: str  # model and prompts
    rows: tuple[tuple[str, ...], ...] = ()  # the printed figures, the header first; empty if there is only a plot
    says: str = ""  # the finding, in our words


FIGURE_3 = Paper(
    f"Vicuna 7B and 13B on {MT_BENCH}, against transformers' own decoding",
    (
        ("", "Vicuna-7B", "Vicuna-13B"),
        ("speedup, Medusa-1", "2.18", "2.33"),
        ("speedup, Medusa-2", "2.83", "2.83"),
        ("speedup, Medusa-2, coding", "3.29", ""),
        ("speedup, Medusa-2, extraction", "3.62", ""),
    ),
    "The other speeds and categories are bars without numbers.",
)
FIGURE_4 = Paper(
    f"Medusa-2 Vicuna-7B on {WRITING}",
    says="A plot without numbers. An optimised tree of 64 nodes accepts more than random dense ones of 256; acceptance grows "
    "with the logarithm of the nodes (0.477 log n, Appendix G), and speed falls where the step becomes bound by arithmetic.",
)
FIGURE_5 = Paper(
    f"Medusa-2 Vicuna-7B on {WRITING}, temperature 0.7, quality graded by GPT-4",
    says="A plot without numbers. As epsilon grows, quality rises and acceleration falls; random sampling is graded above "
    "greedy decoding, and typical acceptance comes near random sampling for large epsilon.",
)
TABLE_1 = Paper(
    f"Medusa-2 on {MT_BENCH}, quality graded by GPT-4 with its difference from the original model",
    (
        ("", "Vicuna-7B", "Zephyr-7B", "Vicuna-13B", "Vicuna-33B"),
        ("acceleration rate", "3.47", "3.14", "3.51", "3.01"),
        ("overhead", "1.22", "1.18", "1.23", "1.27"),
        ("quality", "6.18 (+0.01)", "7.25 (-0.07)", "6.43 (-0.14)", "7.18 (+0.05)"),
        ("speedup, speculative decoding", "1.47", "", "1.56", "1.60"),
        ("speedup, Medusa", "2.83", "2.66", "2.83", "2.35"),
    ),
)
TABLE_3 = Paper(
    "Vicuna-7B",
    (
        ("technique", "speedup"),
        ("Medusa-1 heads without tree attention", "~1.5"),
        ("with tree attention", "~1.9"),
        ("with the optimised tree", "~2.2"),
        ("heads trained with Medusa-2", "~2.8"),
    ),
    "Each line adds to the one before. Dynamic trees are ours.",
)
TABLE_4 = Paper(
    "Medusa-2 on AlpacaEval",
    (
        ("model", "base tokens/s", "Medusa tokens/s", "acceleration rate", "speedup"),
        ("Vicuna-7B", "37.07", "106.76", "3.23", "2.88"),
        ("Vicuna-13B", "29.01", "91.54", "3.28", "3.16"),
        ("Vicuna-33B", "17.87", "40.43", "2.85", "2.26"),
        ("Zephyr-7B", "34.21", "99.50", "3.08", "2.91"),
    ),
)
FIGURE_7 = Paper(
    f"Vicuna 7B, 13B and 33B on {MT_BENCH}, with Llama-68M, Llama-160M, Tiny-Llama and Tiny-Vicuna as draft models",
    (
        ("", "Vicuna-7B", "Vicuna-13B", "Vicuna-33B"),
        ("best draft model", "Llama-68M", "Llama-68M", "Tiny-Vicuna"),
        ("best gamma", "4", "3", "3"),
    ),
    "Speeds are bars without numbers.",
)
