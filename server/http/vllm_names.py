"""Serves the metrics under vLLM's names as well (`--metrics-names vllm`), for routers, autoscalers and dashboards that
read vLLM's /metrics.

The names are those of vLLM 0.11 and later (`vllm/v1/metrics/loggers.py`). The names that older versions had are served
too, because vLLM's production stack still reads them. The label is `model_name`. vLLM's label `engine` is left out: a
router takes one number for each server, so a metric here is that of all engines of this server together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jamba_server.engine.errors import EngineError
from jamba_server.engine.process.client import Engine

OWN, VLLM = "jamba_", "vllm:"

# The names that a family of this server has in vLLM, without the prefixes. Latencies have the same meaning there.
# Histograms have this server's buckets, which are finer.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_requests_running": ("num_requests_running",),
    "num_requests_waiting": ("num_requests_waiting",),
    "kv_cache_usage_perc": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "num_preemptions": ("num_preemptions",),
    "prefix_cache_queries": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "prefix_cache_hits": ("prefix_cache_hits", "gpu_prefix_cache_hits", "prompt_tokens_cached"),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens",),
    "request_success": ("request_success",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "request_time_per_output_token_seconds": ("request_time_per_output_token_seconds",),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "request_queue_time_seconds": ("request_queue_time_seconds",),
}


class BothNames(Collector):
    """Returns every family of `own`, and once more under vLLM's name where vLLM has the same metric."""

    def __init__(self, own: Collector, engine: Engine, *, model_name: str) -> None:
        self._own, self._engine, self._model_name = own, engine, model_name

    def collect(self) -> Iterable[Metric]:
        families = list(self._own.collect())
        yield from families
        for family in families:
            yield from _renamed(family)
        yield _hit_rate(families, self._model_name)
        yield from self._cache_config()

    def _cache_config(self) -> Iterator[Metric]:
        """Yields the size of the KV cache as labels, as vLLM has it: llm-d reads how many tokens a page has, and how
        many pages there are. There is nothing to tell before the engine has loaded."""
        try:
            info = self._engine.info
        except EngineError:
            return
        family = GaugeMetricFamily(
            f"{VLLM}cache_config_info",
            "The size of the KV cache, in labels.",
            labels=["model_name", "block_size", "num_gpu_blocks"],
        )
        family.add_metric([self._model_name, str(info.block_size), str(info.num_kv_blocks)], 1)
        yield family


def _renamed(family: Metric) -> Iterator[Metric]:
    for name in _NAMES.get(family.name.removeprefix(OWN), ()):
        copy = Metric(f"{VLLM}{name}", family.documentation, family.type, family.unit)
        copy.samples = [
            sample._replace(name=f"{VLLM}{name}{sample.name.removeprefix(family.name)}") for sample in family.samples
        ]
        yield copy


def _hit_rate(families: Iterable[Metric], model_name: str) -> Metric:
    """The share of prompt tokens found in the prefix cache since the start. vLLM has dropped this gauge for the two
    counters, but the production stack still reads it."""
    totals = {sample.name: sample.value for family in families for sample in family.samples}
    queries, hits = (totals[f"{OWN}prefix_cache_{name}_total"] for name in ("queries", "hits"))
    family = GaugeMetricFamily(
        f"{VLLM}gpu_prefix_cache_hit_rate", "Share of prompt tokens found in the prefix cache.", labels=["model_name"]
    )
    family.add_metric([model_name], hits / queries if queries else 0.0)
    return family
