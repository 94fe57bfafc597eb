"""Objects: what the answers of all endpoints have, and how chat completions and completions are sent, whole or in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from medusa.serving.answers import Answers, Update
from medusa.serving.calls import Service
from medusa.serving.streams import event


@dataclass
class Answered:
    """The answer to a body."""

    service: Service
    body: Any
    answers: Answers
    request_id: str
    created: int = field(default_factory=lambda: int(time.time()))


class Completion(Answered, ABC):
    """The answer to a body of `Sampling`, whole or in chunks."""

    prefix: ClassVar[str]  # of ids
    kinds: ClassVar[tuple[str, str]]  # of the whole object and of a chunk

    @abstractmethod
    def add(self, update: Update) -> None:
        """Take what a step adds to the whole object."""

    @abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """The choices of the whole object, at the end."""

    @abstractmethod
    def events(self, update: Update) -> Iterable[bytes]:
        """The chunks of a step."""

    async def whole(self) -> dict[str, Any]:
        """The whole object."""
        steps = []
        async for update in self.answers.updates():
            self.add(update)
            if update.trace is not None:
                steps.append({"index": update.index, **update.trace})
        found = {**self._object(self.kinds[0], self.choices()), "usage": self.answers.usage()}
        return {**found, "medusa": {"steps": steps}} if self.body.medusa.trace != "none" else found

    async def chunks(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        async for update in self.answers.updates():
            for each in self.events(update):
                yield each
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event({**self._object(self.kinds[1], []), "usage": self.answers.usage()})

    def chunk(self, choice: dict[str, Any], trace: dict[str, Any] | None = None) -> bytes:
        """The event of a chunk with one choice."""
        chunk = self._object(self.kinds[1], [choice])
        if (options := self.body.stream_options) is not None:
            if options.continuous_usage_stats:
                chunk["usage"] = self.answers.usage()
            elif options.include_usage:
                chunk["usage"] = None
        if trace is not None:
            chunk["medusa"] = trace
        return event(chunk)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.service.name,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }
