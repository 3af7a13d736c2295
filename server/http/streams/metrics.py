"""The metrics of kept streams."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jamba_server.server.http.streams.registry import KeptStreams


@dataclass(frozen=True, eq=False)  # eq=False keeps objects hashable, which the registry needs
class StreamCollector(Collector):
    """Reads the numbers of kept streams each time Prometheus requests the metrics."""

    model_name: str
    streams: KeptStreams

    def collect(self) -> Iterable[Metric]:
        gauges = (
            ("kept_streams", "Number of streams that are kept for clients that reconnect.", len(self.streams)),
            (
                "kept_stream_bytes",
                "Estimated size of all events that are kept, in bytes.",
                self.streams.num_bytes,
            ),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"jamba_{name}", text, labels=["model_name"])
            gauge.add_metric([self.model_name], value)
            yield gauge
        counters = (
            ("resumed_streams", "Number of connections that continued a kept stream.", self.streams.num_resumed),
            (
                "expired_streams",
                "Number of kept streams that were dropped because no client came back to read them.",
                self.streams.num_expired,
            ),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(f"jamba_{name}", text, labels=["model_name"])
            counter.add_metric([self.model_name], value)
            yield counter
