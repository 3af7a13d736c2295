"""Spans of requests."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.middleware import Middleware

from jamba_server.engine.errors import ConfigError
from jamba_server.server.http import app as app_module
from jamba_server.server.http.tracing.setup import Tracing, open_tracing
from tests.server.conftest import Bench, MakeBench, chat

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from jamba_server.server.http.tracing import spans

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(make_bench: MakeBench, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Bench:
    provider = spans.provider_with(SimpleSpanProcessor(exporter), "1.0")
    tracing = Tracing(lambda ignored: Middleware(spans.Tracing, provider=provider, ignored=ignored), provider.shutdown)
    monkeypatch.setattr(app_module, "open_tracing", lambda endpoint, version: tracing)
    return make_bench(api_key=("key",))


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_has_one_span_in_the_clients_trace(
    traced: Bench, exporter: InMemorySpanExporter, stream: bool
) -> None:
    headers = {"x-api-key": "key", "x-request-id": "r1", **PARENT}
    async with traced.http() as http:
        await http.post(
            "/v1/chat/completions", json=chat(stream=stream, max_tokens=2, temperature=0.5), headers=headers
        )
    [span] = exporter.get_finished_spans()
    assert span.name == "POST /v1/chat/completions"
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, "b7ad6b7169203331")
    found = attributes(span)
    assert found["http.response.status_code"] == 200
    assert found["jamba.request_id"] == "r1"
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == "jamba"
    assert (found["gen_ai.request.max_tokens"], found["gen_ai.request.temperature"]) == (2, 0.5)
    assert found["gen_ai.usage.output_tokens"] == 2
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert found["gen_ai.latency.time_in_queue"] == 0.25
    assert found["gen_ai.latency.time_to_first_token"] >= 0
    assert span.resource.attributes["service.name"] == "jamba-server"


async def test_latencies_have_exemplars(traced: Bench) -> None:
    key = {"x-api-key": "key"}
    async with traced.http() as http:
        await http.post("/v1/chat/completions", json=chat(), headers=key | PARENT)
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        text = (await http.get("/metrics", headers=key | accept)).text
        plain = (await http.get("/metrics", headers=key)).text
    found = {
        sample.name: sample.exemplar.labels["trace_id"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    }
    names = (
        *("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"),
        "request_time_per_output_token",
    )
    assert found == {f"jamba_{name}_seconds_bucket": TRACE for name in names}
    assert "trace_id" not in plain


async def test_refusals_have_a_span_and_probes_have_none(traced: Bench, exporter: InMemorySpanExporter) -> None:
    traced.engine.refusal = RuntimeError("a bug")  # pyright: ignore[reportAttributeAccessIssue]
    async with traced.http() as http:
        await http.post("/v1/chat/completions", json=chat())
        await http.post("/v1/chat/completions", json=chat(), headers={"x-api-key": "key"})
        await http.get("/health")
        await http.get("/metrics", headers={"x-api-key": "key"})
        await http.get("/nothing", headers={"x-api-key": "key"})
    refused, failed, lost = exporter.get_finished_spans()
    assert [attributes(span)["http.response.status_code"] for span in (refused, failed)] == [401, 500]
    assert lost.name == "GET other"  # a path that clients choose is no name of a span
    assert (refused.status.status_code, failed.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)


def test_without_an_endpoint_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "jamba_server.server.http.tracing.spans"
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules[name.rpartition(".")[0]], "spans")
    assert open_tracing(None, "1.0") is None
    with pytest.raises(ConfigError, match=r"pip install 'jamba-server\[otel\]'"):
        open_tracing("http://127.0.0.1:4318/v1/traces", "1.0")
