"""Rows: the options of a request, its row on the host, and the settings of all rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medusa.acceptance import TypicalAcceptance
from medusa.config import integer
from medusa.processors.warpers import Warpers
from medusa.sampling import Processors, RowProcessors, RowText, choose

StoppingCriterion = Callable[[Tensor, None], Tensor]
VACANT = "vacant"  # the finish reason of a row without a request
READING = "reading"  # of a row whose prompt is being processed in chunks


@dataclass(frozen=True)
class DecodingOptions:
    """Options of decoding. Rows of one batch may have different ones.

    Args:
        max_new_tokens: limit of new tokens.
        do_sample: draw from the backbone's distribution instead of taking its argmax.
        typical: thresholds of typical acceptance; None: acceptance is exact.
        processors: logits processors, temperature among them.
        eos_token_ids: ids that end it; the id itself is part of the output.
        stopping_criteria: transformers' criteria, applied after every token as in plain decoding.
        seed: seed of the draws; row b of a call has its own stream, (seed, b).
    """

    max_new_tokens: int
    do_sample: bool = False
    typical: TypicalAcceptance | None = None
    processors: Processors = field(default_factory=Processors)
    eos_token_ids: tuple[int, ...] = ()
    stopping_criteria: Sequence[StoppingCriterion] = ()
    seed: int = 0

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("seed", None)):
            object.__setattr__(self, name, integer(name, getattr(self, name), least))


@dataclass
class Row:
    """A request in its row: its settings, and what the host knows of it.

    A row without a request, or whose request has ended, takes part in every step without effect, until `start` fills it.
    """

    options: DecodingOptions = DecodingOptions(max_new_tokens=1)
    stream: tuple[int, int] = (0, 0)  # of its draws, see `row_keys`
    ends: Callable[[int], bool] | None = None  # called with each token in order; True ends the row
    prompt: Tensor | None = None  # (P,) long, padding included
    pads: int = 0
    root: int = 0
    generated: list[int] = field(default_factory=list)
    finish_reason: str | None = VACANT  # None: it is being decoded
    memory: dict[Any, Any] = field(default_factory=dict)  # what its processors have worked out, see `RowText`
    error: Exception | None = None  # what one of its processors or criteria raised; the reason is then "error"

    @property
    def committed(self) -> int:
        """The number of its committed slots, padding included."""
        return (0 if self.prompt is None else len(self.prompt)) + len(self.generated)

    def text(self) -> RowText:
        """Its tokens so far."""
        assert self.prompt is not None
        tokens = torch.cat([self.prompt, self.prompt.new_tensor(self.generated)])
        return RowText(tokens, self.pads, len(self.prompt), self.generated, self.memory)


class RowSettings:
    """The settings of all rows, arranged so that a step follows them for all rows at once."""

    def __init__(self, rows: Sequence[Row], device: torch.device):
        options = [row.options for row in rows]
        self.processors = RowProcessors([own.processors for own in options], device)
        drawing = [number for number, own in enumerate(options) if draws(own)]
        self.draws = bool(drawing)
        self.plain = all(map(_is_plain, options))  # no row has other settings than a temperature
        self.drawing = torch.tensor(drawing, device=device) if 0 < len(drawing) < len(rows) else None  # None: all, or none
        self.typical: dict[TypicalAcceptance, Tensor | None] = {}  # which rows accept by these thresholds, (B,) bool; None: all
        for thresholds in dict.fromkeys(own.typical for own in options if own.do_sample and own.typical is not None):
            chosen = [own.do_sample and own.typical == thresholds for own in options]
            self.typical[thresholds] = None if all(chosen) else torch.tensor(chosen, device=device)

    def choose(
        self,
        scores: Tensor,  # (B, N, V): before the warpers
        keys: Tensor | None,  # (B, N) long: of positions
    ) -> Tensor:  # (B, N) long
        """The backbone's token after every node: a draw where the row samples, else the likeliest."""
        scores = self.processors.warp(scores)
        if self.drawing is None or keys is None:
            return choose(scores, keys if self.draws else None)
        drawn = choose(scores[self.drawing], keys[self.drawing])
        return choose(scores, None).index_copy(0, self.drawing, drawn)


def draws(options: DecodingOptions) -> bool:
    """Whether tokens are drawn; typical acceptance takes the likeliest for roots."""
    return options.do_sample and options.typical is None


def _is_plain(options: DecodingOptions) -> bool:
    """Whether tokens are the likeliest, or drawn at a temperature, from scores that nothing else changes."""
    warpers = options.processors.warpers
    only = Warpers(temperature=warpers.temperature if draws(options) else None)
    return draws(options) == options.do_sample and not options.processors.steps and warpers == only


def temperature(options: DecodingOptions) -> float:
    """The temperature of the draws; 0 if nothing is drawn."""
    if not draws(options):
        return 0.0
    chosen = options.processors.warpers.temperature
    return 1.0 if chosen is None else chosen
