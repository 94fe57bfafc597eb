"""Metrics of the server, under vLLM's names where it has them, so that its boards and tools read them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from medusa.serving.requests import Delivery, Load, Serves

if TYPE_CHECKING:
    from medusa.serving.answers import Answer

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
STEPS = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.25, 2.5, 3, 3.5, 4, 5, 6, 8, 12, 16)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """The counters and histograms of one server, in a registry of its own.

    Drafts are counted twice: `vllm:spec_decode_*` counts as vLLM does for a chain, with the depth of the tree as the number of
    draft tokens, so that acceptance rates compare; `medusa:` counts the nodes.

    Args:
        model: the model's name.
        engine: whose load is shown.
    """

    def __init__(self, model: str, engine: Serves):
        self.registry = CollectorRegistry()
        self._names = {"model_name": model, "engine": "0"}
        self._engine = engine
        self.registry.register(self)  # its `collect` shows the load
        histogram, counter = self._histogram, self._counter
        self.time_to_first_token = histogram("vllm:time_to_first_token_seconds", "Time to the first token.", SECONDS)
        self.inter_token = histogram("vllm:inter_token_latency_seconds", "Time since the step before, per token.", SECONDS)
        self.per_token = histogram("vllm:request_time_per_output_token_seconds", "A request's mean time per token.", SECONDS)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Time from a call to the end of an answer.", SECONDS)
        self.queue = histogram("vllm:request_queue_time_seconds", "Time in the queue.", SECONDS)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "Time from the queue to the first token.", SECONDS)
        self.inference = histogram("vllm:request_inference_time_seconds", "Time from the queue to the end.", SECONDS)
        self.decode = histogram("vllm:request_decode_time_seconds", "Time from the first token to the last.", SECONDS)
        self.prompt_sizes = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.answer_sizes = histogram("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS)
        self.limits = histogram("vllm:request_params_max_tokens", "The limit of an answer.", TOKENS)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.generated = counter("vllm:generation_tokens", "Tokens generated.")
        self.over_share = counter("medusa:share_rejections", "Calls refused since their client had its share.")
        self.rejected = counter("vllm:admission_rejections", "Calls refused since the queue was full.")
        self.queries = counter("vllm:prefix_cache_queries", "Tokens of prompts looked up in the cache.")
        self.hits = counter("vllm:prefix_cache_hits", "Tokens of prompts found in the cache.")
        self.drafts = counter("vllm:spec_decode_num_drafts", "Steps of requests that drafted.")
        self.draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Draft tokens, as the depth of each tree.")
        self.accepted = counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self.nodes = counter("medusa:draft_nodes", "Draft tokens, as the nodes below the root of each tree.")
        self.step_seconds = histogram("medusa:step_seconds", "Duration of a step, seen by each request in it.", SECONDS)
        self.emitted = histogram("medusa:tokens_per_step", "Tokens that a step emitted for a request.", range(1, 17))
        self.per_step = histogram("medusa:request_tokens_per_step", "An answer's mean tokens per step.", STEPS)
        labels = ("model_name", "engine", "position")
        self.by_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by depth.", labels, registry=self.registry
        )
        self.ended = Counter(
            "vllm:request_success", "Answers that ended, by reason.", ("model_name", "finished_reason"), registry=self.registry
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, tuple(self._names), registry=self.registry).labels(**self._names)

    def _histogram(self, name: str, text: str, buckets: Any) -> Histogram:
        return Histogram(name, text, tuple(self._names), buckets=buckets, registry=self.registry).labels(**self._names)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges, read from the engine when they are asked for."""
        load = self._engine.load()
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in slots.", load.running),
            ("vllm:num_requests_waiting", "Requests in the queue.", load.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the cache that is in use; 1 is full.", _usage(load)),
            ("medusa:tree_nodes", "Nodes of the tree in use, the root included; 1: plain decoding.", load.nodes),
            ("medusa:slots", "Requests that decode at a time.", load.slots),
            ("medusa:graphs_left", "Compiled steps that are still to be made, while nothing decodes.", load.graphs_left),
        ):
            family = GaugeMetricFamily(name, text, labels=tuple(self._names))
            family.add_metric(tuple(self._names.values()), value)
            yield family
        speeds = GaugeMetricFamily(
            "medusa:tree_speedup",
            "Tokens per second over those of plain decoding, measured, by rows, length and nodes.",
            labels=(*self._names, "rows", "length", "nodes"),
        )
        found = {(str(speed.rows), str(speed.length), str(speed.nodes)): speed.speedup for speed in load.speeds}
        for labels, speedup in found.items():
            speeds.add_metric((*self._names.values(), *labels), speedup)
        yield speeds

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

    def delivered(self, answer: Answer, delivery: Delivery, started: float) -> None:
        """Count what a step delivered.

        Args:
            started: time.monotonic() when the call came.
        """
        now, tokens = time.monotonic(), len(delivery.tokens)
        if not tokens:
            return
        self.generated.inc(tokens)
        if answer.steps == 1:
            self.time_to_first_token.observe(now - started)
            self.queue.observe(answer.queued_seconds)
            self.prefill.observe(max(0.0, now - started - answer.queued_seconds))
            self.prompt_tokens.inc(len(answer.call.ids))
            self.queries.inc(len(answer.call.ids))
            self.hits.inc(answer.cached)
        else:
            self.inter_token.observe(answer.gap / tokens)
        self.step_seconds.observe(delivery.seconds)
        self.emitted.observe(tokens)
        if delivery.drafted:
            self.drafts.inc()
            self.draft_tokens.inc(delivery.depth)
            self.nodes.inc(delivery.drafted)
            self.accepted.inc(tokens - 1)
            for position in range(tokens - 1):
                self.by_position.labels(**self._names, position=str(position)).inc()

    def finished(self, answer: Answer, started: float) -> None:
        """Count an answer that is complete."""
        now = time.monotonic()
        first = now if answer.first_at is None else answer.first_at
        self.e2e.observe(now - started)
        self.inference.observe(max(0.0, now - started - answer.queued_seconds))
        self.per_step.observe(answer.tokens / max(1, answer.steps))
        self.decode.observe(now - first)
        if answer.tokens > 1:
            self.per_token.observe((now - first) / (answer.tokens - 1))
        self.prompt_sizes.observe(len(answer.call.ids))
        self.answer_sizes.observe(answer.tokens)
        self.limits.observe(answer.call.requests[0].options.max_new_tokens)
        self.ended.labels(self._names["model_name"], answer.finish_reason).inc()


def _usage(load: Load) -> float:
    return load.cached_tokens / max(1, load.slots * load.capacity)
