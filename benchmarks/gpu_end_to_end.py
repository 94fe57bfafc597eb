"""Everything from nothing on a machine with one GPU: a code model, its heads, their trees, and what they gain.

    python benchmarks/gpu_end_to_end.py --work results/gpu --minutes 9     # and again, until nothing is left

Pretrains a Llama of 100-400 M parameters on the Python source that is installed here, has it write training data, trains
Medusa-1 and Medusa-2 heads, chooses trees, and benches them on held-out files against transformers' generate, greedily and
sampled, compiled and not. The stages share `--total-minutes`; a run does as much as fits in `--minutes`, writes what there
is to results.json and results.md, says what is left and exits 0. Killed at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from end_to_end.heads import continuations, medusa_1, medusa_2
from end_to_end.measuring import bench, exactness, tuning
from end_to_end.pretraining import pretraining
from end_to_end.report import write_report
from end_to_end.source import installed, source
from end_to_end.work import SIZES, SliceOver, Work
from transformers.utils import logging

from medusa.errors import MedusaError

STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    "source": source,
    "pretraining": pretraining,
    "continuations": continuations,
    "medusa-1": medusa_1,
    "medusa-2": medusa_2,
    "tuning": tuning,
    "exactness": exactness,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None, now: Callable[[], float] = time.monotonic) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that all is kept in")
    parser.add_argument("--size", choices=SIZES, default="100m", help="of the backbone [100m]; toy is for trying it out")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this run [9]")
    parser.add_argument("--total-minutes", type=float, default=25.0, help="of all runs together, the same in each [25]")
    parser.add_argument("--source", type=Path, nargs="+", help="folders of Python files [all that is installed]")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stages = STAGES | {"source": functools.partial(source, folders=args.source or installed())}
    try:
        work = Work(args.work, args.size, args.minutes, args.total_minutes, now)
        try:
            run(work, stages)
        finally:  # whatever stopped it, what there is is written
            left = write_report(work, args.size, list(STAGES))
    except MedusaError as error:
        sys.exit(f"error: {error}")
    print(f"left: {', '.join(left)}; run the same command again" if left else f"done: {args.work / 'results.md'}")


def run(work: Work, stages: Mapping[str, Callable[[Work], dict[str, Any]]]) -> None:
    """The stages that are not done, until all are or the slice is over."""
    for name, stage in stages.items():
        if work.read(f"{name}.json") is None:
            print(f"{name}, {work.left():.0f} s left of this run", file=sys.stderr, flush=True)
            try:
                with work.timed(name):
                    found = stage(work)
            except SliceOver:
                return
            work.write(f"{name}.json", found)
            gc.collect()  # trainers hold their models in cycles
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
