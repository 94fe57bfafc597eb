"""Hidden states on disk: a frozen backbone runs once over the data, and the heads are trained from its hidden states."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from medusa.checkpoints.tensors import write_tensors
from medusa.errors import InvalidInput, one_line
from medusa.model import MedusaModel
from medusa.runs.console import progress
from medusa.runs.provenance import fingerprint
from medusa.runs.records import claim
from medusa.training.data import Row, Rows, collate

SHARD_TOKENS = 1 << 18
CLAIM = "hidden_states.yaml"


class RowsWithHiddenStates:
    """Rows with the backbone's hidden states of their tokens, read from the shards that `save_hidden_states` wrote."""

    def __init__(self, rows: Rows, folder: Path, shards: list[tuple[int, int]]):
        self._rows, self._folder, self._shards = rows, folder, shards
        # For each row: its shard, and the offset of its tokens there.
        self._places: list[tuple[int, int]] = []
        for shard, (first, last) in enumerate(shards):
            start = 0
            for row in rows.rows[first:last]:
                self._places.append((shard, start))
                start += len(row)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[int, Row]:
        _, row = self._rows[number]
        shard, start = self._places[number]
        path = _shard(self._folder, shard)
        try:
            with safe_open(path, framework="pt") as file:  # memory-mapped: only this row is read
                hidden = file.get_slice("hidden_states")[start : start + len(row)]
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"cannot read {path}: {one_line(error)}; remove it and run the same command again") from None
        return number, dataclasses.replace(row, hidden=hidden)


def save_hidden_states(
    model: MedusaModel, rows: Rows, folder: str | Path, shard_tokens: int = SHARD_TOKENS
) -> RowsWithHiddenStates:
    """Save the hidden states of all rows, 2 d bytes per token in bfloat16. Existing shards are kept; those of other data or
    another backbone are refused. A shard holds at least `shard_tokens` tokens."""
    folder = Path(folder)
    made_of = {"data": rows.fingerprint(), "backbone": fingerprint(model.backbone), "shard_tokens": shard_tokens}
    claim(folder / CLAIM, made_of)
    shards, first, tokens = [], 0, 0
    for number, row in enumerate(rows, 1):
        tokens += len(row)
        if tokens >= shard_tokens or number == len(rows):
            shards.append((first, number))
            first, tokens = number, 0
    with progress("Hidden states", rows.tokens, "tokens", unit_scale=True) as bar:
        for shard, (first, last) in enumerate(shards):
            part = rows.rows[first:last]
            if not _is_whole(_shard(folder, shard), sum(map(len, part))):
                write_tensors({"hidden_states": _compute(model, part)}, _shard(folder, shard))
            bar.update(sum(map(len, part)))
    return RowsWithHiddenStates(rows, folder, shards)


@torch.inference_mode()
def _compute(model: MedusaModel, rows: list[Row]) -> torch.Tensor:  # (tokens, d)
    """The hidden states of rows, concatenated; rows of similar length share a batch, which needs little padding."""
    batch_size = 64 if model.device.type == "cuda" else 8
    hidden: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([(number, rows[number]) for number in chosen])
        segments = batch["segments"].to(model.device)
        packed = segments if bool((segments > 1).any()) else None
        states = model.hidden_states(batch["input_ids"].to(model.device), packed).cpu()
        for number, state in zip(chosen, states, strict=True):
            hidden[number] = state[: len(rows[number])].clone()
    return torch.cat(hidden)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"hidden_states-{number:05d}.safetensors"


def _is_whole(path: Path, tokens: int) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice("hidden_states").get_shape()[0] == tokens
    except (OSError, SafetensorError):  # broken: written again
        return False
