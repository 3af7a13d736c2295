"""Prometheus metrics: vLLM's names with the prefix `jamba_`, and what only a hybrid has (state slots, lost prefixes).

What the engine counts is read from `EngineStats` when somebody scrapes; what only the server sees is counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jamba_server.engine.process.client import Engine
from jamba_server.engine.types import EngineStats, FinishReason

# All begin at 1 ms: a quantile is interpolated within its bucket, so what is far below the first bound shows as half of
# it. Time to first token has vLLM's buckets.
_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_ITL_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 2400,
)  # fmt: skip

_Read = Callable[[EngineStats], float]

_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("num_requests_running", "Choices in the batch.", lambda s: s.num_running),
    ("num_requests_waiting", "Choices in the queue.", lambda s: s.num_waiting),
    ("kv_cache_usage_perc", "Used share of the KV pages; 1 is all.", lambda s: s.kv_blocks_used / s.kv_blocks_capacity),
    (
        "state_slots_used",
        "State slots of running sequences; saved states lie in the others, int8 ones apart.",
        lambda s: s.state_slots_used,
    ),
    ("state_slots_capacity", "Recurrent states that fit.", lambda s: s.state_slots_capacity),
    ("saved_states", "Saved states that a later request can go on from.", lambda s: s.saved_states),
)

_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("num_preemptions", "Sequences that gave their pages back and waited again.", lambda s: s.num_preemptions_total),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries_total),
    ("prefix_cache_hits", "Prompt tokens read from the prefix cache.", lambda s: s.prefix_hits_total),
)

_MISSED: tuple[tuple[str, _Read], ...] = (
    ("no_state", lambda s: s.missed_no_state_total),
    ("evicted", lambda s: s.missed_evicted_total),
)


class Metrics:
    """All metrics of one application, in a registry of its own."""

    def __init__(self, engine: Engine, *, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name
        self.prompt_tokens = self.generation_tokens = 0
        self.registry.register(_EngineCollector(self, engine))
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to the first token of a choice.", _TTFT_BUCKETS
        )
        self._inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice.", _ITL_BUCKETS
        )
        self._e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to the end of a choice.", _LATENCY_BUCKETS
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds", "From a choice's arrival at the engine to its first step.", _LATENCY_BUCKETS
        )
        self._success = self._counter("request_success", "Choices by the reason why they ended.", "finished_reason")
        self._http = self._counter("http_requests", "HTTP requests by route and status.", "path", "status")
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model_name, reason)  # a series that is 0 is there from the start

    def queued(self, seconds: float) -> None:
        self._queue_time.labels(self.model_name).observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._time_to_first_token.labels(self.model_name).observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._inter_token_latency.labels(self.model_name).observe(seconds)

    def finished(self, reason: FinishReason, seconds: float) -> None:
        self._success.labels(self.model_name, reason).inc()
        if reason in ("stop", "length"):  # an aborted one would pass for a quick one
            self._e2e_latency.labels(self.model_name).observe(seconds)

    def count_http_request(self, path: str, status: int) -> None:
        self._http.labels(self.model_name, path, str(status)).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"jamba_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"jamba_{name}", text, ["model_name", *labels], registry=self.registry)


class _EngineCollector(Collector):
    """Reads the engine's numbers at scrape time."""

    def __init__(self, metrics: Metrics, engine: Engine) -> None:
        self._metrics, self._engine = metrics, engine

    def collect(self) -> Iterable[Metric]:
        stats, labels = self._engine.stats, [self._metrics.model_name]
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"jamba_{name}", text, labels=["model_name"])
            gauge.add_metric(labels, read(stats))
            yield gauge
        for name, text, read in _COUNTERS:
            yield _counter_family(name, text, labels, read(stats))
        yield _counter_family("prompt_tokens", "Prompt tokens taken in.", labels, self._metrics.prompt_tokens)
        yield _counter_family("generation_tokens", "Tokens generated.", labels, self._metrics.generation_tokens)
        missed = CounterMetricFamily(
            "jamba_prefix_cache_missed_tokens",
            "Prompt tokens that were computed again though their KV pages were there once, by what was missing.",
            labels=["model_name", "reason"],
        )
        for reason, read in _MISSED:
            missed.add_metric([*labels, reason], read(stats))
        yield missed


def _counter_family(name: str, text: str, labels: list[str], value: float) -> CounterMetricFamily:
    family = CounterMetricFamily(f"jamba_{name}", text, labels=["model_name"])
    family.add_metric(labels, value)
    return family
