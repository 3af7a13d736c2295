"""The Prometheus metrics of the prefix cache's tiers in host memory and on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jamba_server.engine.types import TierStats


def tier_metrics(stats: TierStats, model_name: str) -> Iterable[Metric]:
    """Yields the metrics. They are served only if there is a tier."""
    by_tier: tuple[tuple[str, str, Mapping[str, float]], ...] = (
        ("prefix_tier_hits", "Number of prefixes that were restored from a tier.", stats.hits_total),
        (
            "prefix_tier_hit_tokens",
            "Number of tokens that were restored from a tier instead of being computed.",
            stats.hit_tokens_total,
        ),
        ("prefix_tier_restored_bytes", "Number of bytes restored from a tier.", stats.restored_bytes_total),
        (
            "prefix_tier_restore_seconds",
            "Time that restores from a tier took, in seconds: reading and checking for the disk, copying for the host.",
            stats.restore_seconds_total,
        ),
    )
    for name, text, values in by_tier:
        yield _counters(name, text, "tier", values, model_name)
    yield _counters(
        "prefix_tier_ignored_files",
        "Number of files of the disk tier that could not be used, by reason.",
        "reason",
        stats.ignored_files_total,
        model_name,
    )
    alone = (
        ("prefix_tier_written_bytes", "Number of bytes written to the disk tier.", stats.written_bytes_total),
        ("prefix_tier_written_segments", "Number of segments written to the disk.", stats.written_segments_total),
        ("prefix_tier_failed_writes", "Number of segments that the disk did not take.", stats.failed_writes_total),
        (
            "prefix_tier_dropped_segments",
            "Number of segments that were not kept because too many bytes waited for the disk.",
            stats.dropped_segments_total,
        ),
    )
    for name, text, value in alone:
        family = CounterMetricFamily(f"jamba_{name}", text, labels=["model_name"])
        family.add_metric([model_name], value)
        yield family
    yield _gauges("prefix_tier_bytes", "Size of the segments in a tier, in bytes.", stats.num_bytes, model_name)
    yield _gauges("prefix_tier_segments", "Number of segments in a tier.", stats.segments, model_name)
    staged = GaugeMetricFamily(
        "jamba_prefix_tier_staged_bytes",
        "Size of the segments that wait for the disk, in bytes.",
        labels=["model_name"],
    )
    staged.add_metric([model_name], stats.staged_bytes)
    yield staged


def _counters(name: str, text: str, label: str, values: Mapping[str, float], model_name: str) -> Metric:
    family = CounterMetricFamily(f"jamba_{name}", text, labels=["model_name", label])
    for value, number in values.items():
        family.add_metric([model_name, value], number)
    return family


def _gauges(name: str, text: str, values: Mapping[str, float], model_name: str) -> Metric:
    family = GaugeMetricFamily(f"jamba_{name}", text, labels=["model_name", "tier"])
    for value, number in values.items():
        family.add_metric([model_name, value], number)
    return family
