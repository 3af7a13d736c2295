"""The metrics of the HTTP process's limits: connections, bytes of request bodies, and prompt tokens that wait."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jamba_server.server.http.limits.edge import Edge


@dataclass(frozen=True, eq=False)  # eq=False keeps objects hashable, which the registry needs
class EdgeCollector(Collector):
    """Reads the current numbers of connections, body bytes and waiting prompt tokens each time Prometheus requests the
    metrics."""

    model_name: str
    edge: Edge

    def collect(self) -> Iterable[Metric]:
        gauges = (
            ("http_connections", "Number of open connections of clients.", self.edge.connections.num_open),
            ("request_body_bytes", "Number of bytes in the bodies of all requests under way.", self.edge.bodies.total),
            (
                "waiting_prompt_tokens",
                "Number of prompt tokens of requests whose reply has no token yet.",
                self.edge.waiting.total,
            ),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"jamba_{name}", text, labels=["model_name"])
            gauge.add_metric([self.model_name], value)
            yield gauge
        refused = CounterMetricFamily(
            "jamba_http_connections_refused",
            "Number of connections that got status 503 because too many others were open.",
            labels=["model_name"],
        )
        refused.add_metric([self.model_name], self.edge.connections.num_refused)
        yield refused
