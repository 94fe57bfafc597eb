"""Calibration: how often each guess of each head is right, and which rank paths come true together; `calibration.json`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from medusa.errors import CheckpointError, one_line
from medusa.runs.files import read_json, write_text
from medusa.trees.search import search_joint_tree
from medusa.trees.static import MedusaTree

CALIBRATION_FILE = "calibration.json"
MOST_PATHS = 1024

Path_ = tuple[int, ...]  # of ranks, one per head


class Scored(Protocol):
    """A text with guesses that can be right; `tuning.recording.Recorded` is one."""

    @property
    def guesses(self) -> Tensor: ...  # (T, K, R)

    def right(self) -> Tensor: ...  # (T, K) long: which guess of each head was right, -1 if none was


@dataclass(frozen=True)
class Calibration:
    """How often the heads' guesses were right."""

    hits: list[list[int]]  # [k - 1][i]: number of places at which exactly guess i (0-based) of head k was right
    positions: int  # number of places at which the heads guessed
    # The rank paths that came true most often, each with its count; no independence of the heads is assumed.
    paths: list[tuple[Path_, int]]

    @classmethod
    def of(cls, texts: Sequence[Scored], places: Sequence[Tensor] | None = None) -> Calibration:
        """The counts of recorded texts.

        Args:
            places: for every text, (T,) bool, the places that count; None: all of them.
        """
        right = torch.cat([text.right() for text in texts])
        right = right if places is None else right[torch.cat(list(places))]
        ranks = texts[0].guesses.shape[-1]
        hits = [torch.bincount(column[column >= 0], minlength=ranks).tolist() for column in right.T]
        counts: Counter[Path_] = Counter()
        for row in right.tolist():
            path = tuple(takewhile(lambda rank: rank >= 0, row))
            counts.update(path[:depth] for depth in range(1, len(path) + 1))
        paths = sorted(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[:MOST_PATHS]
        return cls(hits, len(right), paths)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a `calibration.json`, or the one in a folder; CheckpointError if there is none."""
        path = Path(path) / CALIBRATION_FILE if Path(path).is_dir() else Path(path)
        if not path.exists():
            raise CheckpointError(f"no calibration {path}; medusa tune --output writes one beside the tree")
        found = read_json(path, CheckpointError)
        try:
            paths, positions = [(tuple(ranks), int(count)) for ranks, count in found["paths"]], int(found["positions"])
            if positions < 1:
                raise ValueError("no positions")
            return cls(found.get("hits", []), positions, paths)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a calibration written by medusa tune: {one_line(error)}") from None

    def save(self, path: Path, made_with: dict[str, Any]) -> None:
        """Write a `calibration.json`, with the model, machine and settings that it was made with."""
        write_text(path, json.dumps({**self.to_dict(), "made_with": made_with}) + "\n")

    @property
    def accuracies(self) -> list[list[float]]:
        """[k - 1][i]: the share of places at which exactly guess i of head k was right."""
        return [[hit / max(self.positions, 1) for hit in row] for row in self.hits]

    def intervals(self) -> list[list[tuple[float, float]]]:
        """The 95 % intervals of the accuracies (Wilson's), as if places were independent."""
        return [[wilson(hit, self.positions) for hit in row] for row in self.hits]

    def conditional(self, path: Path_) -> list[float]:
        """How often each guess of head k + 1 was right where the guesses of heads 1 to k at the ranks of `path` were right;
        independent of `path` if heads erred independently."""
        counts = dict(self.paths)
        above = counts.get(path, 0) if path else self.positions
        ranks = len(self.hits[0])
        return [counts.get((*path, rank), 0) / above if above else 0.0 for rank in range(ranks)]

    def search(self, num_nodes: int) -> MedusaTree:
        """The tree of this size, the root included, whose paths came true most often."""
        return search_joint_tree(self.paths, num_nodes)

    def path_chances(self, tree: MedusaTree) -> dict[Path_, float]:
        """How often each path of a tree came true, as a share of places; 0 for paths that were not counted."""
        counts = dict(self.paths)
        return {path: counts.get(path, 0) / self.positions for path in tree.paths}

    def expected_acceptance_length(self, tree: MedusaTree) -> float:
        """Tokens per step, the root included, averaged over all places."""
        return 1 + sum(self.path_chances(tree).values())

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "accuracies": self.accuracies,
            "intervals": self.intervals(),
            "after_first_guesses": [self.conditional((0,) * depth)[:8] for depth in range(len(self.hits))],
        }


def wilson(hits: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share by Wilson's score.

    >>> [round(bound, 3) for bound in wilson(50, 100)]
    [0.404, 0.596]
    """
    if not asked:
        return 0.0, 1.0
    share, spread = hits / asked, z * z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / asked + spread / asked / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
