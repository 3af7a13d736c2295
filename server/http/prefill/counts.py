"""Counts the hand-overs of a decode server, and makes Prometheus metrics of the counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jamba_server.server.http.prefill.in_flight import BytesInFlight

# How a hand-over ended. If it was not "received" or "found", this server computes the prompt itself, after the segments
# that have come.
Result = Literal[
    "received",  # the segments came over HTTP
    "found",  # the segments were in a folder that both servers use
    "unreachable",  # no connection could be made, or it broke
    "refused",  # the prefill server has refused the request
    "other_model",  # the prefill server has another model, version or processor
    "damaged",  # a file or a list is not what the prefill server has sent
    "timeout",  # the hand-over has taken longer than --prefill-timeout
    "resting",  # all prefill servers have failed a short time ago
    "too_large",  # the segments have more bytes than --prefill-max-bytes
    "not_open",  # the disk tier of this server is not open yet
    "not_written",  # the disk tier of this server could not keep the segments
    "abandoned",  # the client has left
]
RESULTS: tuple[Result, ...] = get_args(Result)


@dataclass(slots=True)
class HandOverCounts:
    """The counts since the start of the server. `seconds` has the time of the hand-overs with each result. `tokens` are
    the prompt tokens of successful hand-overs, and `num_bytes` all bytes of segments that came over HTTP."""

    results: dict[Result, int] = field(default_factory=lambda: dict.fromkeys(RESULTS, 0))
    seconds: dict[Result, float] = field(default_factory=lambda: dict.fromkeys(RESULTS, 0.0))
    tokens: int = 0
    num_bytes: int = 0

    def add(self, result: Result, *, tokens: int = 0, num_bytes: int = 0, seconds: float = 0.0) -> None:
        self.results[result] += 1
        self.seconds[result] += seconds
        self.num_bytes += num_bytes
        if result in ("received", "found"):
            self.tokens += tokens


@dataclass(frozen=True, eq=False)  # eq=False keeps objects hashable, which the registry needs
class HandOverCollector(Collector):
    """Reads the counts each time Prometheus requests the metrics. `in_flight` knows how many bytes arrive now."""

    model_name: str
    counts: HandOverCounts
    in_flight: BytesInFlight

    def collect(self) -> Iterable[Metric]:
        by_result = (
            ("prefill_hand_overs", "Number of prompts handed to a prefill server, by result.", self.counts.results),
            ("prefill_hand_over_seconds", "Time of these hand-overs, in seconds, by result.", self.counts.seconds),
        )
        for name, text, values in by_result:
            family = CounterMetricFamily(f"jamba_{name}", text, labels=["model_name", "result"])
            for result, value in values.items():
                family.add_metric([self.model_name, result], value)
            yield family
        alone = (
            (
                "prefill_hand_over_tokens",
                "Number of prompt tokens that prefill servers have handed over.",
                self.counts.tokens,
            ),
            (
                "prefill_hand_over_bytes",
                "Number of bytes of segments that came from prefill servers over HTTP.",
                self.counts.num_bytes,
            ),
        )
        for name, text, value in alone:
            family = CounterMetricFamily(f"jamba_{name}", text, labels=["model_name"])
            family.add_metric([self.model_name], value)
            yield family
        gauge = GaugeMetricFamily(
            "jamba_prefill_bytes_in_flight",
            "Number of bytes of segments that arrive from prefill servers now.",
            labels=["model_name"],
        )
        gauge.add_metric([self.model_name], self.in_flight.total)
        yield gauge
