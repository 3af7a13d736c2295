"""The Prometheus metrics of the server. If vLLM has the same metric, the name is vLLM's name with the
prefix `jamba_`.

The metrics of state slots, saved states and missed prefixes do not exist in vLLM. They exist here because Jamba
models keep recurrent states as well as KV pages. The engine counts requests, pages, states and prefix-cache tokens, and
these numbers are read from `EngineStats` at each scrape. The class `Metrics` counts all other values in the HTTP
process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Literal, cast, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from jamba_server.engine.process.client import Engine, SupervisionStats
from jamba_server.engine.process.step_times import BOUNDS
from jamba_server.engine.types import CacheTier, EngineStats, FinishReason, MissReason
from jamba_server.server.http.tier_metrics import tier_metrics
from jamba_server.server.http.tracing.annotations import exemplar
from jamba_server.server.http.vllm_names import BothNames
from jamba_server.server.option_values import MetricsNames

# Upper bounds of the histograms' buckets, in seconds. Prometheus estimates a quantile by linear interpolation between
# the bounds of one bucket. If all values were far below the first bound, Prometheus would show half of that bound as
# the median. The first bound of each list is therefore only 1 ms. `_TTFT_BUCKETS` has vLLM's bounds for the same
# metric.
_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_ITL_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 2400,
)  # fmt: skip

_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

# Maximum number of different field names that are used as labels of the metric `ignored_fields`. Clients choose these
# names, and without a limit they could fill the memory of Prometheus.
MAX_FIELD_LABELS = 50

AbortReason = Literal["disconnect", "send_timeout", "deadline", "engine_failed", "engine_dead", "error"]

STATE_SLOTS_HELP = (
    "Number of state slots held by running sequences. Saved states are in the other slots, or in a pool of their own "
    "if they are stored as int8."
)

_Read = Callable[[EngineStats], float]

_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("num_requests_running", "Number of choices that are running.", lambda s: s.num_running),
    (
        "num_requests_waiting",
        "Number of choices that wait in the queue, without those of batches.",
        lambda s: s.num_waiting,
    ),
    (
        "num_background_running",
        "Number of running choices that belong to batches.",
        lambda s: s.num_background_running,
    ),
    (
        "num_background_waiting",
        "Number of choices of batches that wait in the queue.",
        lambda s: s.num_background_waiting,
    ),
    (
        "kv_cache_usage_perc",
        "Share of the KV pages that are in use, from 0 to 1.",
        lambda s: s.kv_blocks_used / s.kv_blocks_capacity,
    ),
    ("state_slots_used", STATE_SLOTS_HELP, lambda s: s.state_slots_used),
    (
        "state_slots_capacity",
        "Number of state slots; each holds one recurrent state.",
        lambda s: s.state_slots_capacity,
    ),
    (
        "pinned_kv_pages",
        "Number of KV pages that requests have pinned (`cache.pin`).",
        lambda s: s.pinned_blocks,
    ),
    ("pinned_states", "Number of saved states that requests have pinned (`cache.pin`).", lambda s: s.pinned_states),
    ("saved_states", "Number of saved states from which a later request can continue.", lambda s: s.saved_states),
)

_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    (
        "num_preemptions",
        "Number of preemptions: a running sequence, not of a batch, loses its KV pages and waits again.",
        lambda s: s.num_preemptions_total,
    ),
    (
        "prefix_cache_queries",
        "Number of prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_queries_total,
    ),
    ("prefix_cache_hits", "Number of prompt tokens found in the prefix cache.", lambda s: s.prefix_hits_total),
    (
        "prefix_cache_joined_requests",
        "Number of choices that waited until another one had computed the prefix that both have.",
        lambda s: s.num_joined_total,
    ),
)

_MISSED: tuple[tuple[str, _Read], ...] = (
    ("no_state", lambda s: s.missed_no_state_total),
    ("evicted", lambda s: s.missed_evicted_total),
)

# Prompt tokens found in the prefix cache, by the place where their state was stored.
_TIERS: tuple[tuple[CacheTier, _Read], ...] = (
    ("device", lambda s: s.hits_device_total),
    ("host", lambda s: s.hits_host_total),
    ("disk", lambda s: s.hits_disk_total),
)

# Prompt tokens that were computed because nothing could be found: nobody has computed them before, as far as the cache
# remembers, or the request did not read the cache.
_UNCACHED: tuple[tuple[MissReason, _Read], ...] = (
    ("not_seen", lambda s: s.missed_not_seen_total),
    ("read_disabled", lambda s: s.missed_read_disabled_total),
)


class Metrics:
    """All metrics of one application. Each application has its own Prometheus registry, so that two applications in one
    process do not share metrics.

    If spans are recorded, the histograms of latencies have exemplars: for each bucket, the ids of a trace and a span
    whose request has such a latency. Only the format OpenMetrics has them.
    """

    def __init__(self, engine: Engine, *, model_name: str, names: MetricsNames = "jamba") -> None:
        self.registry = CollectorRegistry()
        self._exposed = BothNames(self.registry, engine, model_name=model_name) if names == "vllm" else self.registry
        self.model_name = model_name
        self.prompt_tokens = self.generation_tokens = 0
        self.registry.register(_EngineCollector(self, engine))
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "Time from a request's arrival to the first token of a choice, in seconds.",
            _TTFT_BUCKETS,
        )
        self._inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Time between two successive tokens of a choice, in seconds.", _ITL_BUCKETS
        )
        self._e2e_latency = self._histogram(
            "e2e_request_latency_seconds",
            "Time from a request's arrival to the end of a choice, in seconds, without failed and aborted choices.",
            _LATENCY_BUCKETS,
        )
        self._time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time between two successive tokens of a choice that has ended, in seconds.",
            _ITL_BUCKETS,
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds",
            "Time from a choice's arrival at the engine to its first step, in seconds.",
            _LATENCY_BUCKETS,
        )
        self._loop_lag = self._histogram(
            "event_loop_lag_seconds",
            "Time by which the HTTP process's event loop woke a timer up too late, in seconds, four times a second.",
            _LAG_BUCKETS,
        )
        self._success = self._counter(
            "request_success", "Number of choices that ended, by finish reason, errors included.", "finished_reason"
        )
        self._aborted = self._counter(
            "aborted_requests",
            "Number of choices that were ended early: their client disconnected (disconnect) or did not read "
            "(send_timeout), the engine died because of them (engine_failed) or for good (engine_dead), or the server "
            "had an unexpected error (error).",
            "reason",
        )
        self._http = self._counter("http_requests", "Number of HTTP requests, by route and status.", "path", "status")
        self._ignored = self._counter(
            "ignored_fields",
            "Number of requests with a field that the API does not have and that was ignored, by field.",
            "field",
        )
        self._loop_lag.labels(model_name)
        self._field_labels: set[str] = set()
        self._ignored.labels(model_name, "other")
        for reason in ("stop", "length", "abort", "error"):
            # Prometheus needs two values of a series to compute a rate, so each series starts with the value 0.
            self._success.labels(model_name, reason)
        for reason in get_args(AbortReason):
            self._aborted.labels(model_name, reason)

    def queued(self, seconds: float) -> None:
        self._queue_time.labels(self.model_name).observe(seconds, exemplar())

    def first_token(self, seconds: float) -> None:
        self._time_to_first_token.labels(self.model_name).observe(seconds, exemplar())

    def next_token(self, seconds: float) -> None:
        self._inter_token_latency.labels(self.model_name).observe(seconds, exemplar())

    def finished(self, reason: FinishReason, seconds: float | None, seconds_per_token: float | None = None) -> None:
        """Counts a choice that has ended. `seconds` is its latency, or None if the latency is not measured.
        `seconds_per_token` is the mean time between two of its tokens, or None if it had fewer than two."""
        self._success.labels(self.model_name, reason).inc()
        # Failed and aborted choices end early and would lower the measured latency.
        if seconds is None or reason not in ("stop", "length"):
            return
        self._e2e_latency.labels(self.model_name).observe(seconds, exemplar())
        if seconds_per_token is not None:
            self._time_per_output_token.labels(self.model_name).observe(seconds_per_token, exemplar())

    def encoded(self, accept: str) -> tuple[bytes, str]:
        """Returns the metrics in the text format that the HTTP header `Accept` asks for, and the name of this
        format."""
        chosen, content_type = choose_encoder(accept)
        # All names are valid without escaping. Without this argument, prometheus-client 0.26 makes an underscore of the
        # colon in vLLM's names in the format OpenMetrics, but only in the lines with the values.
        encode = cast(Callable[..., bytes], chosen)
        return encode(self._exposed, escaping="allow-utf-8"), content_type

    def aborted(self, reason: AbortReason) -> None:
        self._aborted.labels(self.model_name, reason).inc()

    def loop_lag(self, seconds: float) -> None:
        self._loop_lag.labels(self.model_name).observe(seconds)

    def count_http_request(self, path: str, status: int) -> None:
        self._http.labels(self.model_name, path, str(status)).inc()

    def count_ignored_fields(self, names: Iterable[str]) -> None:
        """Adds one to the counter of each field name in `names`. The server ignored these fields of one request.

        Only the first MAX_FIELD_LABELS different names get counters of their own; all later names count as `other`.
        """
        for name in names:
            if len(self._field_labels) < MAX_FIELD_LABELS:
                self._field_labels.add(name)
            self._ignored.labels(self.model_name, name if name in self._field_labels else "other").inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"jamba_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"jamba_{name}", text, ["model_name", *labels], registry=self.registry)


class _EngineCollector(Collector):
    """Returns the engine's current statistics and the token counts each time Prometheus requests the metrics."""

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
        prompt, generated = self._metrics.prompt_tokens, self._metrics.generation_tokens
        yield _counter_family("prompt_tokens", "Number of prompt tokens, cached ones included.", labels, prompt)
        yield _counter_family("generation_tokens", "Number of tokens generated.", labels, generated)
        missed = CounterMetricFamily(
            "jamba_prefix_cache_missed_tokens",
            "Number of prompt tokens that were in the prefix cache once and were computed again: their state was never "
            "saved (no_state), or their pages or state were evicted (evicted).",
            labels=["model_name", "reason"],
        )
        for reason, read in _MISSED:
            missed.add_metric([*labels, reason], read(stats))
        yield missed
        yield from _prefix_cache(stats, labels)
        if stats.tiers is not None:
            yield from tier_metrics(stats.tiers, self._metrics.model_name)
        yield from self._supervision(labels)

    def _supervision(self, labels: list[str]) -> Iterable[Metric]:
        done = self._engine.supervision
        restarts = CounterMetricFamily(
            "jamba_engine_restarts",
            "Number of restarts of the engine process, by the reason of its end.",
            labels=["model_name", "reason"],
        )
        for reason, number in done.restarts.items():
            restarts.add_metric([*labels, reason], number)
        yield restarts
        replayed, pauses = done.replayed_requests, done.pauses
        yield _counter_family(
            "replayed_requests", "Number of choices sent again to a restarted engine.", labels, replayed
        )
        yield _counter_family("stream_pauses", "Number of pauses of a stream whose client read slowly.", labels, pauses)
        backlog = GaugeMetricFamily(
            "jamba_stream_backlog_bytes",
            "Estimated size of the tokens that wait for slow clients, in bytes.",
            labels=["model_name"],
        )
        backlog.add_metric(labels, done.backlog_bytes)
        yield backlog
        yield self._steps(done, labels)

    def _steps(self, done: SupervisionStats, labels: list[str]) -> Metric:
        steps = HistogramMetricFamily(
            "jamba_engine_step_seconds",
            "Duration of the engine's steps, in seconds, by what a step computes: prompts (prefill), replies (decode) "
            "or both (mixed).",
            labels=["model_name", "kind"],
        )
        for kind, histogram in done.step_times.items():
            totals = accumulate(histogram.counts)
            bounds = [*map(floatToGoString, BOUNDS), "+Inf"]
            steps.add_metric([*labels, kind], list(zip(bounds, totals, strict=True)), histogram.seconds)
        return steps


def _prefix_cache(stats: EngineStats, labels: list[str]) -> Iterable[Metric]:
    tiers = CounterMetricFamily(
        "jamba_prefix_cache_tier_hits",
        "Number of prompt tokens found in the prefix cache, by the tier that had their state.",
        labels=["model_name", "tier"],
    )
    for tier, read in _TIERS:
        tiers.add_metric([*labels, tier], read(stats))
    yield tiers
    uncached = CounterMetricFamily(
        "jamba_prefix_cache_uncached_tokens",
        "Number of prompt tokens that were computed and that the prefix cache had never had, as far as it remembers "
        "(not_seen), or whose request did not read the cache (read_disabled).",
        labels=["model_name", "reason"],
    )
    for reason, read in _UNCACHED:
        uncached.add_metric([*labels, reason], read(stats))
    yield uncached


def _counter_family(name: str, text: str, labels: list[str], value: float) -> CounterMetricFamily:
    family = CounterMetricFamily(f"jamba_{name}", text, labels=["model_name"])
    family.add_metric(labels, value)
    return family
