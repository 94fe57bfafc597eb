"""Distillation on many machines: the same answers as a Ray Data job."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from typing import Any

from medusa.runs.extras import require
from medusa.training.distillation import Answerer, Seed


class RayAnswerer:
    """Distributes seeds over workers, some at a time, each with its own answerer; outcomes come back as they are made. `make`,
    which is pickled, builds a worker's answerer on the worker. Ray hands the seeds of a worker that dies to another."""

    def __init__(self, make: Callable[[], Answerer], workers: int, batch_size: int):
        self._ray = require("ray", "ray", "--ray")
        self._data = require("ray.data", "ray", "--ray")
        self._make, self._workers, self._batch_size = make, workers, batch_size

    def __call__(self, seeds: Iterable[Seed]) -> Iterator[tuple[Seed, dict[str, Any] | str, int]]:
        by_id = {seed.id: seed for seed in seeds}
        if not by_id:
            return
        ray, make = self._ray, self._make

        class Worker:
            def __init__(self) -> None:
                self.answerer = make()

            def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
                outcomes: dict[str, list] = {"id": [], "outcome": [], "tokens": []}
                handed = [
                    Seed(s["id"], tuple(s["turns"]), s["text"], s["whole"], tuple(s["ids"]))
                    for s in map(json.loads, batch["seed"])
                ]
                for seed, outcome, tokens in self.answerer(handed):
                    outcomes["id"].append(seed.id)
                    outcomes["outcome"].append(json.dumps(outcome))
                    outcomes["tokens"].append(tokens)
                return outcomes

        with redirect_stdout(sys.stderr):  # Ray prints there which workers died
            started = not ray.is_initialized()
            if started:
                ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
            self._data.DataContext.get_current().enable_progress_bars = False
            items = [{"seed": json.dumps(dataclasses.asdict(seed))} for seed in by_id.values()]
            blocks = max(1, -(-len(items) // self._batch_size))  # outcomes come back block by block
            data = self._data.from_items(items, override_num_blocks=blocks)
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
            results = data.map_batches(Worker, batch_size=self._batch_size, concurrency=self._workers, num_gpus=gpus)
            try:
                for row in results.iter_rows():
                    yield by_id[row["id"]], json.loads(row["outcome"]), int(row["tokens"])
            finally:
                if started:
                    ray.shutdown()
