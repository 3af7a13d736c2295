"""/metrics: names, types and values; the rules that promtool checks."""

from __future__ import annotations

import asyncio
import re
import shutil
from itertools import pairwise
from subprocess import PIPE, STDOUT

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jamba_server.engine.process.client import SupervisionStats
from jamba_server.engine.process.step_times import StepTimes
from jamba_server.engine.process.totals import continued_tiers
from jamba_server.engine.types import EngineStats, StepTime, TierStats
from tests.server.conftest import HELLO, Bench, Ids, MakeBench, chat
from tests.server.fake_engine import QUEUE_SECONDS, FakeEngine

STATS = EngineStats(
    num_running=3, num_waiting=5, kv_blocks_used=1, kv_blocks_capacity=4, state_slots_used=6, state_slots_capacity=8,
    saved_states=2, num_preemptions_total=7, prefix_queries_total=100, prefix_hits_total=60,
    missed_no_state_total=11, missed_evicted_total=12, num_steps_total=13,
    hits_device_total=30, hits_host_total=20, hits_disk_total=10,
)  # fmt: skip
FROM_STATS = {
    "jamba_num_requests_running": 3,
    "jamba_num_requests_waiting": 5,
    "jamba_kv_cache_usage_perc": 0.25,
    "jamba_state_slots_used": 6,
    "jamba_state_slots_capacity": 8,
    "jamba_saved_states": 2,
    "jamba_num_preemptions_total": 7,
    "jamba_prefix_cache_queries_total": 100,
    "jamba_prefix_cache_hits_total": 60,
}


async def scrape(bench: Bench) -> str:
    async with bench.http() as http:
        response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return response.text


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Returns the samples by their names and the values of all labels but model_name, sorted by the labels' names."""
    return {
        (sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


TIERS = TierStats(
    hits_total={"host": 1, "disk": 2}, hit_tokens_total={"host": 100, "disk": 200},
    restored_bytes_total={"host": 10, "disk": 20}, restore_seconds_total={"host": 0.5, "disk": 1.5},
    ignored_files_total={"torn": 3, "edited": 0}, written_bytes_total=4, written_segments_total=5,
    failed_writes_total=6, dropped_segments_total=7, staged_bytes=8,
    num_bytes={"host": 9, "disk": 11}, segments={"host": 12, "disk": 13},
)  # fmt: skip


async def test_the_tiers_of_the_prefix_cache(bench: Bench) -> None:
    assert "prefix_tier" not in await scrape(bench)
    bench.engine.stats = EngineStats(tiers=continued_tiers(TIERS, TIERS))  # after a restart of the engine
    found = samples(await scrape(bench))
    assert found["jamba_prefix_tier_hits_total", "disk"] == 4
    assert found["jamba_prefix_tier_hit_tokens_total", "host"] == 200
    assert found["jamba_prefix_tier_restore_seconds_total", "disk"] == 3.0
    assert found["jamba_prefix_tier_ignored_files_total", "torn"] == 6
    assert found["jamba_prefix_tier_dropped_segments_total",] == 14
    assert found["jamba_prefix_tier_bytes", "disk"] == 11
    assert found["jamba_prefix_tier_segments", "host"] == 12
    assert found["jamba_prefix_tier_staged_bytes",] == 8


async def test_what_the_engine_counts(bench: Bench) -> None:
    bench.engine.stats = STATS
    found = samples(await scrape(bench))
    assert {name: found[name,] for name in FROM_STATS} == FROM_STATS
    assert found["jamba_prefix_cache_missed_tokens_total", "no_state"] == 11
    assert found["jamba_prefix_cache_missed_tokens_total", "evicted"] == 12
    tiers = [found["jamba_prefix_cache_tier_hits_total", tier] for tier in ("device", "host", "disk")]
    assert tiers == [30, 20, 10]


async def test_how_long_steps_take(bench: Bench) -> None:
    times = StepTimes()
    for step in (StepTime("decode", 0.002), StepTime("decode", 0.01), StepTime("decode", 99), StepTime("mixed", 0.5)):
        times.add(step)
    bench.engine.supervision = SupervisionStats(step_times=times.histograms())
    found = samples(await scrape(bench))
    name = "jamba_engine_step_seconds"
    at_most = [
        found[f"{name}_bucket", "decode", bound] for bound in ("0.001", "0.0025", "0.005", "0.01", "60.0", "+Inf")
    ]
    assert at_most == [0, 1, 1, 2, 2, 3]
    assert [found[f"{name}_count", kind] for kind in ("prefill", "decode", "mixed")] == [0, 3, 1]
    assert found[f"{name}_sum", "decode"] == 99.012


async def test_what_the_server_counts(bench: Bench, ids: Ids) -> None:
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat(n=2))
        await http.post("/v1/chat/completions", json=chat(n=2, max_tokens=1, stream=True))
        await http.post("/v1/chat/completions", json={})
        await http.get("/nothing")
    found = samples(await scrape(bench))
    num_prompt = len(bench.engine.requests[0].prompt)
    assert found["jamba_prompt_tokens_total",] == 2 * num_prompt  # once a prompt, whatever n
    num_generated = 2 * (len(ids(HELLO)) + 1) + 2
    assert found["jamba_generation_tokens_total",] == num_generated
    assert found["jamba_request_success_total", "stop"] == 2
    assert found["jamba_request_success_total", "length"] == 2
    assert found["jamba_request_success_total", "abort"] == 0
    assert found["jamba_time_to_first_token_seconds_count",] == 4
    assert found["jamba_inter_token_latency_seconds_count",] == num_generated - 4
    assert found["jamba_e2e_request_latency_seconds_count",] == 4
    assert found["jamba_request_time_per_output_token_seconds_count",] == 2  # the others have one token
    assert found["jamba_request_queue_time_seconds_count",] == 4
    assert found["jamba_request_queue_time_seconds_sum",] == 4 * QUEUE_SECONDS
    assert found["jamba_http_requests_total", "/v1/chat/completions", "200"] == 2
    assert found["jamba_http_requests_total", "/v1/chat/completions", "400"] == 1
    assert found["jamba_http_requests_total", "other", "404"] == 1


async def test_milliseconds_are_told_apart(bench: Bench) -> None:
    buckets: dict[str, list[float]] = {}
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat())
    for name, *labels in samples(await scrape(bench)):
        if name.endswith("_seconds_bucket") and labels[0] not in ("prefill", "mixed"):
            buckets.setdefault(name, []).append(float(labels[-1]))
    assert len(buckets) == 7
    for name, bounds in buckets.items():
        assert bounds == sorted(set(bounds)), name
        assert bounds[0] == 0.001, name
        assert bounds[-2] >= 60, name
        # an interpolated quantile is off by less than the width of its bucket
        assert max(high / low for low, high in pairwise(bounds[:-1])) <= 5, name


async def test_requests_for_assets_are_one_series(bench: Bench) -> None:
    async with bench.http() as http:
        for name in ("swagger-ui.css", "nothing.js", "nothing.css"):
            await http.get(f"/docs/assets/{name}")
        await http.get("/docs")
        await http.get("/")
    paths = {labels[0] for name, *labels in samples(await scrape(bench)) if name == "jamba_http_requests_total"}
    assert paths <= {"/", "/docs", "/docs/assets", "other", "/metrics"}


async def test_a_failed_request_is_counted(bench: Bench) -> None:
    bench.engine.script = lambda request: iter([ZeroDivisionError()])
    async with bench.http() as http:
        assert (await http.post("/v1/chat/completions", json=chat())).status_code == 500
    assert samples(await scrape(bench))["jamba_request_success_total", "error"] == 1


async def test_two_applications_share_nothing(make_bench: MakeBench) -> None:
    one, other = make_bench(), make_bench()
    async with one.http() as http:
        await http.post("/v1/chat/completions", json=chat())
    assert samples(await scrape(other))["jamba_generation_tokens_total",] == 0


async def test_the_conventions_of_prometheus(bench: Bench) -> None:
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat())
    text = await scrape(bench)
    families = {f.name: f for f in text_string_to_metric_families(text)}
    for name, family in families.items():
        assert family.documentation.endswith("."), name
        assert re.fullmatch(r"jamba_[a-z0-9_]+", name)
        assert {dict(s.labels).get("model_name") for s in family.samples} == {"jamba"}, name
        if family.type == "counter":
            assert f"# TYPE {name}_total counter" in text
        if family.type == "histogram":
            assert name.endswith("_seconds")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool(bench: Bench) -> None:
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat())
    text = await scrape(bench)
    program = ("promtool", "check", "metrics")
    promtool = await asyncio.create_subprocess_exec(*program, stdin=PIPE, stdout=PIPE, stderr=STDOUT)
    said, _ = await promtool.communicate(text.encode())
    assert (promtool.returncode, said) == (0, b"")


async def test_openmetrics(bench: Bench, engine: FakeEngine) -> None:
    engine.stats = STATS
    async with bench.http() as http:
        response = await http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert " # {" not in response.text  # exemplars need spans
    assert response.text.endswith("# EOF\n")
