"""Records a span for each HTTP request and sends the spans to a collector.

OpenTelemetry is installed only with the optional dependencies `otel`, so this module is imported only if the option
`--otlp-traces-endpoint` is given.
"""

from __future__ import annotations

import os

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jamba_server.server.http.errors import CLIENT_CLOSED_REQUEST, request_id_of, tenant_of
from jamba_server.server.http.tracing.annotations import CURRENT_SPAN

SERVICE_NAME = "jamba-server"
# Time limit in seconds for sending a batch of spans, including all retries. The shutdown of the server waits for the
# last batch.
EXPORT_SECONDS = 3.0
NAME_VARIABLE = "OTEL_SERVICE_NAME"


def tracer_provider(endpoint: str, version: str) -> TracerProvider:
    """Returns a provider of OpenTelemetry tracers. Its spans are sent to `endpoint` in the background, in batches of
    bounded size.

    The variables of OpenTelemetry's specification, such as OTEL_SERVICE_NAME and OTEL_TRACES_SAMPLER, are honoured.
    """
    return provider_with(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)), version)


def provider_with(processor: SpanProcessor, version: str) -> TracerProvider:
    """Returns a provider of OpenTelemetry tracers that passes its spans to `processor`."""
    attributes = {"service.version": version}
    # An attribute that is given here would take precedence over the environment variable.
    if NAME_VARIABLE not in os.environ:
        attributes["service.name"] = SERVICE_NAME
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(processor)
    return provider


class Tracing:
    """Middleware that records one span for each request, except for requests to the paths in `ignored`. It encloses the
    middleware `RequestContext`.

    The client's header `traceparent` makes the span a part of the client's trace. The names of attributes are those of
    OpenTelemetry's conventions for HTTP servers.
    """

    def __init__(self, app: ASGIApp, *, provider: TracerProvider, ignored: frozenset[str]) -> None:
        self.app, self.ignored = app, ignored
        self._tracer = provider.get_tracer(SERVICE_NAME)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.ignored:
            await self.app(scope, receive, send)
            return
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method: str = scope["method"]
        span = self._tracer.start_span(method, context=extract(dict(Headers(scope=scope))), kind=SpanKind.SERVER)
        token = CURRENT_SPAN.set(span)
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                await self.app(scope, receive, send_and_note)
        finally:
            CURRENT_SPAN.reset(token)
            route: str = scope["state"]["route"]
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
            span.set_attribute("http.request.method", method)
            span.set_attribute("http.response.status_code", status or CLIENT_CLOSED_REQUEST)
            span.set_attribute("jamba.request_id", request_id_of(scope))
            if owner := tenant_of(scope):
                span.set_attribute("jamba.tenant", owner)
            if status >= 500:
                span.set_status(StatusCode.ERROR)
            span.end()
