"""A fleet: what replicas of a model serve, plain and with trees, within a limit of latency or under a load.

A replica is the engine of `medusa.serving`, full of requests that are alike: as one ends, the next one takes its place, and its
prompt is read between two steps. With b requests at a time, of P tokens of prompt and G of answer,

    seconds per token of a request = step time(b) / tokens per step + b · seconds of a prompt / G
    tokens per second of the replica = b / seconds per token of a request
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medusa.errors import InvalidInput
from medusa.simulation.prediction import Acceleration, Setting

MEMORY_SHARE = 0.9  # share of the memory for weights, keys and values; the rest is for activations


@dataclass(frozen=True)
class Replica:
    """Requests, all alike, on the GPUs that hold one copy of the model."""

    setting: Setting
    prompt: int  # tokens of a request's prompt
    answer: int  # tokens of a request's answer
    acceleration: Acceleration
    sizes: Sequence[int]  # tree sizes that the replica chooses from; (1,) decodes plainly

    @property
    def most_requests(self) -> int:
        """The number of whole requests whose keys and values fit beside the weights; 0 if the weights do not fit."""
        setting = self.setting
        heads = setting.heads_memory if max(self.sizes) > 1 else 0.0
        weights = setting.memory(0, 0) + heads
        a_request = setting.memory(1, self.prompt + self.answer) - setting.memory(0, 0)
        return max(0, int((MEMORY_SHARE * setting.gpus * setting.hardware.memory - weights) / a_request))

    def operating(self, requests: int) -> Operating:
        """With this number of requests at a time, on average half-way through their answers, and the tree that is fastest."""
        length = self.prompt + self.answer // 2
        prompts = requests * self.setting.prefill_seconds(self.prompt) / self.answer
        times = {size: self.setting.seconds(requests, length, size) / self.acceleration(size) for size in self.sizes}
        size = min(times, key=times.__getitem__)
        return Operating(requests, size, times[size] + prompts)

    def within(self, seconds_per_token: float) -> Operating | None:
        """The most requests for which a token takes no longer than this; None if one request is too slow."""
        return self._last(lambda found: found.seconds_per_token <= seconds_per_token)

    def under(self, tokens_per_second: float) -> Operating | None:
        """The fewest requests with which the replica generates this many tokens per second; None if it cannot."""
        short = self._last(lambda found: found.tokens_per_second < tokens_per_second)
        requests = short.requests + 1 if short is not None else 1
        return self.operating(requests) if requests <= self.most_requests else None

    def _last(self, holds: Callable[[Operating], bool]) -> Operating | None:
        """The operating point of the most requests for which this holds; times and tokens only rise with requests."""
        if self.most_requests < 1:
            raise InvalidInput("the weights leave no memory for a request; give more --gpus or fewer --weight-bits")
        low, high = 0, self.most_requests + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(self.operating(middle)) else (low, middle)
        return self.operating(low) if low else None


@dataclass(frozen=True)
class Operating:
    """A replica at work."""

    requests: int
    candidates: int  # nodes of the tree, the root included; 1 is plain decoding
    seconds_per_token: float  # of one request; other requests' prompts included

    @property
    def tokens_per_second(self) -> float:
        return self.requests / self.seconds_per_token

    def cost(self, price: float, gpus: int) -> float:
        """The cost of a million generated tokens, if a GPU costs `price` for one hour."""
        return 1e6 * price * gpus / 3600 / self.tokens_per_second
