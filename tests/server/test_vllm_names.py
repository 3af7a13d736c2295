"""`--metrics-names vllm`: /metrics under the names that routers for vLLM read."""

from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import MakeBench, chat
from tests.server.fake_engine import INFO
from tests.server.test_metrics import STATS, samples, scrape

# What the routers read: `EngineStats.from_vllm_scrape` of vLLM's production stack, and the defaults of llm-d's endpoint
# picker (`options.go`) without LoRA.
PRODUCTION_STACK = {
    "vllm:num_requests_running": 3.0,
    "vllm:num_requests_waiting": 5.0,
    "vllm:gpu_prefix_cache_hit_rate": 0.6,
    "vllm:gpu_prefix_cache_hits_total": 60.0,
    "vllm:gpu_prefix_cache_queries_total": 100.0,
    "vllm:gpu_cache_usage_perc": 0.25,
}
LLM_D = {"vllm:num_requests_waiting": 5.0, "vllm:num_requests_running": 3.0, "vllm:kv_cache_usage_perc": 0.25}
LATENCIES = {
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "time_per_output_token_seconds": "inter_token_latency_seconds",
    "request_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "request_queue_time_seconds": "request_queue_time_seconds",
}


async def test_what_routers_read(make_bench: MakeBench) -> None:
    bench = make_bench(metrics_names="vllm")
    bench.engine.stats = STATS
    text = await scrape(bench)
    # Both routers take the samples by their names; one that comes twice would hide the other.
    found = [(s.name, s.value) for f in text_string_to_metric_families(text) for s in f.samples]
    for wanted in (PRODUCTION_STACK, LLM_D):
        assert {name: [value for other, value in found if other == name] for name in wanted} == {
            name: [value] for name, value in wanted.items()
        }
    [config] = [
        s for f in text_string_to_metric_families(text) for s in f.samples if s.name == "vllm:cache_config_info"
    ]
    assert config.labels == {
        "model_name": "jamba",
        "block_size": str(INFO.block_size),
        "num_gpu_blocks": str(INFO.num_kv_blocks),
    }


async def test_both_names_have_the_same_numbers(make_bench: MakeBench) -> None:
    bench = make_bench(metrics_names="vllm")
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat())
        await http.post("/v1/chat/completions", json=chat(max_tokens=1))
    found = samples(await scrape(bench))

    def series(family: str) -> dict[tuple[str, ...], float]:
        return {
            (name.removeprefix(family), *labels): v for (name, *labels), v in found.items() if name.startswith(family)
        }

    for theirs, own in LATENCIES.items():
        assert series(f"vllm:{theirs}") == series(f"jamba_{own}") != {}
    assert found["vllm:e2e_request_latency_seconds_count",] == 2
    assert found["vllm:request_time_per_output_token_seconds_count",] == 1  # a reply of one token has no such time
    for name in ("prompt_tokens_total", "generation_tokens_total"):
        assert found[f"vllm:{name}",] == found[f"jamba_{name}",] > 0
    assert found["vllm:request_success_total", "stop"] == found["vllm:request_success_total", "length"] == 1


async def test_the_label_is_the_model_name_alone(make_bench: MakeBench) -> None:
    bench = make_bench(metrics_names="vllm")
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat())
    text = await scrape(bench)
    families = [f for f in text_string_to_metric_families(text) if f.name.startswith("vllm:")]
    assert len(families) > 15
    for family in families:
        assert {dict(s.labels).get("model_name") for s in family.samples} == {"jamba"}, family.name


async def test_the_formats_are_valid_and_the_default_has_no_such_name(make_bench: MakeBench) -> None:
    assert "vllm:" not in await scrape(make_bench())
    bench = make_bench(metrics_names="vllm")
    async with bench.http() as http:
        reply = await http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    names = [family.name for family in parse_openmetrics(reply.text)]  # raises ValueError for what is not valid
    assert len(names) == len(set(names))
    assert "vllm:num_requests_waiting" in names


async def test_a_loading_engine_has_no_size_of_its_cache(make_bench: MakeBench) -> None:
    bench = make_bench(metrics_names="vllm")
    bench.engine.load("loading weights", 0.5)
    text = await scrape(bench)
    assert "vllm:cache_config_info" not in text
    assert "vllm:num_requests_waiting" in text
