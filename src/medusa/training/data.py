"""Training data: samples as token ids with labels, packed into rows, batched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from medusa.data.samples import Sample, Skips, read_samples
from medusa.data.templates import encode_conversation, overlaps
from medusa.errors import InvalidInput
from medusa.training.losses import IGNORED

FILLER = -1  # number of a row that only fills a batch: the last row, but nothing of it is labelled
SHORTEST = 3  # head 1 guesses the token two places ahead: shorter samples teach nothing


@dataclass(frozen=True)
class Row:
    """One row of training data: a sample, or several packed end to end."""

    ids: Tensor  # (T,) int32
    loss_mask: Tensor  # (T,) bool: whether the token is labelled
    lengths: tuple[int, ...]  # of the samples in it; sums to T
    source: str = ""  # place of its first sample
    hidden: Tensor | None = None  # (T, d): stored hidden states of the frozen backbone

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Rows:
    """A data set in memory: its rows in order, and what was left out."""

    rows: list[Row]
    skips: Skips = field(default_factory=Skips)
    cut: int = 0  # number of conversations longer than a row
    max_length: int = 0  # of a row, in tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, Row]:
        return number, self.rows[number]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def labelled(self) -> int:
        return sum(int(row.loss_mask.sum()) for row in self.rows)

    def fingerprint(self) -> str:
        """A hash of every token, label and border, in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(row.lengths).encode())
            digest.update(row.ids.numpy().tobytes())
            digest.update(row.loss_mask.numpy().tobytes())
        return digest.hexdigest()[:16]


Data = str | Path | Sequence[str | Path]  # one or several files, folders or hub ids


def sources_of(data: Data) -> list[str | Path]:
    return [data] if isinstance(data, str | Path) else list(data)


def load_rows(
    data: Data,
    tokenizer: Any,
    max_length: int,
    vocab_size: int,
    packing: bool = False,  # put several short samples into one row, where they cannot see each other
    progress: bool = False,  # show a bar on stderr
) -> Rows:
    """Every usable sample of one or several data sets as rows of at most `max_length` tokens; InvalidInput if there is none.

    Plain text is cut into several rows; a conversation or a prompt with its completion that is longer is cut at the end.
    """
    skips = Skips()
    samples: Iterable[Sample] = chain.from_iterable(read_samples(one, skips) for one in sources_of(data))
    if progress:
        from tqdm.auto import tqdm

        samples = tqdm(samples, desc="Reading", unit=" samples", delay=1, dynamic_ncols=True)
    rows, shortened = [], 0
    for sample in samples:
        ids, loss_mask = _encode(sample, tokenizer)
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InvalidInput(f"{sample.source} has ids outside the vocabulary of {vocab_size} tokens")
        whole = sample.messages is not None or sample.prompt is not None
        cut = min(max_length, len(ids)) if whole else len(ids)
        parts = zip(
            torch.tensor(ids[:cut], dtype=torch.int32).split(max_length),
            torch.tensor(loss_mask[:cut], dtype=torch.bool).split(max_length),
            strict=True,
        )
        kept = [Row(part, labels, (len(part),), sample.source) for part, labels in parts if labels[SHORTEST - 1 :].any()]
        if not kept:
            skips.add(_why_unusable(ids, loss_mask, cut), sample.source)
        rows += kept
        shortened += cut < len(ids) and bool(kept)
    if not rows:
        raise InvalidInput(f"{', '.join(map(str, sources_of(data)))} holds nothing to learn: {skips}")
    return Rows(pack(rows, max_length) if packing else rows, skips, shortened, max_length)


def _encode(sample: Sample, tokenizer: Any) -> tuple[list[int], list[bool]]:
    if sample.input_ids is not None:
        return list(sample.input_ids), [place >= sample.prompt_tokens for place in range(len(sample.input_ids))]
    if sample.messages is not None:
        last_answer = max((i for i, m in enumerate(sample.messages) if m["role"] == "assistant"), default=-1)
        if last_answer < 0:
            return [], []
        try:
            ids, loss_mask = encode_conversation(tokenizer, sample.messages[: last_answer + 1])
        except InvalidInput as error:
            raise InvalidInput(f"{sample.source}: {error}") from None
        last = max((place for place, labelled in enumerate(loss_mask) if labelled), default=-1)
        if sample.cut and last >= 0 and ids[last] in tokenizer.added_tokens_decoder:
            loss_mask[last] = False  # the template ends the turn, the assistant did not
        return ids, loss_mask
    assert sample.text is not None
    if sample.prompt is None:
        ids = tokenizer(sample.text, verbose=False)["input_ids"]
        return ids, [True] * len(ids)
    text, end = sample.prompt + sample.text, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    if end and ids[-1:] == end:  # a tokenizer that adds the end of a text
        end = []
    loss_mask = overlaps(encoded["offset_mapping"], [(len(sample.prompt), len(text))])
    return ids + end, loss_mask + [True] * len(end)


def _why_unusable(ids: list[int], loss_mask: list[bool], cut: int) -> str:
    if not any(loss_mask):
        return "with no assistant text"
    if cut < len(ids) and not any(loss_mask[:cut]):
        return f"whose assistant text begins past the {cut} tokens of a row"
    return f"of fewer than {SHORTEST} tokens"


def pack(rows: list[Row], max_length: int) -> list[Row]:
    """Rows packed together, the longest first, each into the fullest row with room for it."""
    bins: list[list[Row]] = []
    room: dict[int, list[int]] = {}  # free tokens -> bins with exactly that many
    for row in sorted(rows, key=len, reverse=True):
        fits = min((free for free, which in room.items() if free >= len(row) and which), default=None)
        if fits is None:
            bins.append([])
            number, fits = len(bins) - 1, max_length
        else:
            number = room[fits].pop()
        bins[number].append(row)
        room.setdefault(fits - len(row), []).append(number)
    return [
        Row(
            torch.cat([row.ids for row in parts]),
            torch.cat([row.loss_mask for row in parts]),
            tuple(length for row in parts for length in row.lengths),
            parts[0].source,
        )
        for parts in bins
    ]


COVERED = 0.99  # share of the tokens to be learnt that draft vocabulary `auto` covers


def draft_vocabulary(rows: Rows, wanted: str, vocab_size: int) -> Tensor | None:  # (V',) long, rising
    """The tokens that heads score: the most frequent of those to be learnt.

    Args:
        wanted: a number, `auto` for the fewest that make up 99 % of the text, or `all`, which returns None.
    """
    if wanted == "all":
        return None
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in rows:
        counts += torch.bincount(row.ids[row.loss_mask].long(), minlength=vocab_size)
    order = counts.argsort(descending=True, stable=True)
    if wanted == "auto":
        number = int((counts[order].cumsum(0) < COVERED * counts.sum()).sum()) + 1
    else:
        number = min(int(wanted), vocab_size)
    return order[:number].sort().values


class EpochOrder(Sampler[int]):
    """The numbers of all rows in the order of an epoch, which the seed and the epoch decide, not the number of processes.

    Processes need equally many full batches. transformers' sampler repeats rows for that, which then count twice; here FILLER
    rows take their place.

    Args:
        multiple: number that the length is a multiple of.
        epoch: returns the epoch that begins.
    """

    def __init__(self, rows: int, multiple: int, seed: int, epoch: Callable[[], int]):
        self._rows, self._fillers, self._seed, self._epoch = rows, -rows % multiple, seed, epoch

    def __len__(self) -> int:
        return self._rows + self._fillers

    def __iter__(self) -> Iterator[int]:
        shuffled = torch.randperm(self._rows, generator=torch.Generator().manual_seed(self._seed + self._epoch()))
        return iter(shuffled.tolist() + [FILLER] * self._fillers)


def collate(numbered: Sequence[tuple[int, Row]]) -> dict[str, Tensor]:
    """A batch, right-padded: `input_ids`, `labels` (IGNORED where nothing is to be learnt) and `segments`, all (B, T) long.

    `segments` numbers the samples of a row from 1; padding is 0. Also returns the rows' numbers, `rows` (B,), and
    `hidden` (B, T, d) if the rows have it.
    """
    rows = [row for _, row in numbered]
    shape = len(rows), max(map(len, rows))
    ids, labels, segments = (
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, IGNORED),
        torch.zeros(shape, dtype=torch.long),
    )
    batch = {"input_ids": ids, "labels": labels, "segments": segments, "rows": torch.tensor([number for number, _ in numbered])}
    if rows[0].hidden is not None:
        batch["hidden"] = rows[0].hidden.new_zeros(*shape, rows[0].hidden.shape[-1])
    for b, (number, row) in enumerate(numbered):
        ids[b, : len(row)] = row.ids
        if number != FILLER:
            labels[b, : len(row)] = torch.where(row.loss_mask, row.ids.long(), IGNORED)
        segments[b, : len(row)] = torch.arange(1, len(row.lengths) + 1).repeat_interleave(torch.tensor(row.lengths))
        if row.hidden is not None:
            batch["hidden"][b, : len(row)] = row.hidden
    return batch


def masked_runs(row: Row) -> Iterator[tuple[bool, list[int]]]:
    """The row's token ids in runs with the same loss mask, each with its mask."""
    for mask, run in groupby(zip(row.loss_mask.tolist(), row.ids.tolist(), strict=True), key=lambda token: token[0]):
        yield mask, [token for _, token in run]
