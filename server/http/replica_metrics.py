"""The metrics of each engine, if there are several (`--data-parallel-size`). The other metrics count all together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.replicas.engines import Engines

_Read = Callable[[EngineClient], float]

_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("replica_ready", "Whether an engine runs requests now: 1 or 0.", lambda e: e.health.ready),
    ("replica_requests_running", "Number of choices that run in an engine.", lambda e: e.stats.num_running),
    ("replica_requests_waiting", "Number of choices that wait in an engine.", lambda e: e.stats.num_waiting),
    (
        "replica_kv_cache_usage_perc",
        "Share of an engine's KV pages that are in use, from 0 to 1.",
        lambda e: e.stats.kv_blocks_used / e.stats.kv_blocks_capacity,
    ),
    ("replica_saved_states", "Number of states that an engine has saved.", lambda e: e.stats.saved_states),
)

_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    (
        "replica_prefix_cache_queries",
        "Number of prompt tokens looked up in an engine's prefix cache.",
        lambda e: e.stats.prefix_queries_total,
    ),
    (
        "replica_prefix_cache_hits",
        "Number of prompt tokens found in an engine's prefix cache.",
        lambda e: e.stats.prefix_hits_total,
    ),
    ("replica_restarts", "Number of restarts of an engine's process.", lambda e: e.num_restarts),
)


@dataclass(frozen=True, eq=False)  # eq=False keeps objects hashable, which the registry needs
class ReplicaCollector(Collector):
    """Reads the statistics of each engine, and how many requests went to it, each time Prometheus requests the
    metrics."""

    model_name: str
    engines: Engines

    def collect(self) -> Iterable[Metric]:
        for name, text, read in _GAUGES:
            yield self._filled(GaugeMetricFamily(f"jamba_{name}", text, labels=["model_name", "engine"]), read)
        for name, text, read in _COUNTERS:
            yield self._filled(CounterMetricFamily(f"jamba_{name}", text, labels=["model_name", "engine"]), read)
        routed = CounterMetricFamily(
            "jamba_replica_requests",
            "Number of requests that went to an engine because it knows the longest prefix of the prompt (prefix), had "
            "the least to do (load), or was the only one ready (only).",
            labels=["model_name", "engine", "reason"],
        )
        for number, reasons in enumerate(self.engines.routed):
            for reason, count in reasons.items():
                routed.add_metric([self.model_name, str(number), reason], count)
        yield routed

    def _filled(
        self, family: GaugeMetricFamily | CounterMetricFamily, read: _Read
    ) -> GaugeMetricFamily | CounterMetricFamily:
        for number, engine in enumerate(self.engines.members):
            family.add_metric([self.model_name, str(number)], read(engine))
        return family
