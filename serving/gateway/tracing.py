"""Traces of requests by OpenTelemetry: a span of each request, of each stage that it goes through
in the gateway and in the model server, and of each time that a server is asked.

Without OpenTelemetry's SDK set up, by `export_to` or by an application of which the gateway is a
part, nothing is recorded.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from regionspot import __version__
from regionspot.errors import InputError
from regionspot.serving.contract import STAGES as SERVER_STAGES
from regionspot.serving.contract import RequestError, ServingError
from regionspot.serving.gateway.records import QUIET_ROUTES, Record
from regionspot.serving.messages import Answer
from regionspot.serving.tracing import traces_url

SERVICE = "regionspot-gateway"
FLUSH_S = 3.0
"""How long the end of the process waits for a collector to take the last spans."""

MAX_TRACESTATE = 512
"""Characters; a longer one is left out, as W3C's recommendation allows. It is passed on to servers,
which take headers of a few thousand.
"""

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")

_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_CONTEXT = TraceContextTextMapPropagator()


@contextmanager
def request_span(scope: Any, record: Record) -> Iterator[None]:
    """The span of a request, which belongs to the trace that its `traceparent` names, and is
    described by its record when the block ends. None of what machines and browsers ask all the
    time.
    """
    if record.route in QUIET_ROUTES:
        yield
        return
    with _tracer().start_as_current_span(
        f"{_method(record)} {record.route}",
        _CONTEXT.extract(_carrier(Headers(scope=scope))),
        SpanKind.SERVER,
        record_exception=False,  # the record says what went wrong
        set_status_on_exception=False,
    ) as span:
        if span.is_recording():
            record.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        try:
            yield
        finally:
            if span.is_recording():
                _describe(span, record)


@contextmanager
def server_span(url: str) -> Iterator[ServerSpan]:
    """The span of asking a model server once."""
    with _tracer().start_as_current_span(
        "model", kind=SpanKind.CLIENT, record_exception=False, set_status_on_exception=False
    ) as span:
        span.set_attributes({"rpc.system": "grpc", "server.address": url})
        try:
            yield ServerSpan(span)
        except ServingError as error:
            span.set_attribute("error.type", error.code)
            if not isinstance(error, RequestError):  # the caller's mistake
                span.set_status(StatusCode.ERROR)
            raise


class ServerSpan:
    """See `server_span`."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def show(self, answer: Answer) -> None:
        """Adds the stages in the server. It says how long each took; they are placed so that the
        last one ends now.
        """
        if not self._span.is_recording():
            return
        self._span.set_attributes(
            {"regionspot.cached": answer.cached, "regionspot.model_version": answer.model_version}
        )
        took = [(name, answer.stage_seconds.get(name, 0.0)) for name in SERVER_STAGES]
        began = time.time_ns() - round(sum(seconds for _, seconds in took) * 1e9)
        for name, seconds in took:
            ended = began + round(seconds * 1e9)
            if seconds:
                _tracer().start_span(name, start_time=began).end(ended)
            began = ended


@contextmanager
def export_to(endpoint: str | None) -> Iterator[None]:
    """Sends spans to a collector while the block lasts, by OTLP over HTTP. OpenTelemetry's
    environment variables say the rest: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS, ...

    Args:
        endpoint: the collector's URL, to which v1/traces is added. None takes that of the
            environment, if there is one, and else sends nothing.

    Raises:
        InputError: the SDK is not installed.
    """
    if endpoint is None and not any(os.environ.get(name) for name in _VARIABLES):
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InputError(
            f"traces need OpenTelemetry's SDK ({error}): pip install 'regionspot[tracing]', or "
            f"leave out --otlp-endpoint and {_VARIABLES[0]}"
        ) from error
    known = Resource.create({"service.version": __version__})
    if str(known.attributes["service.name"]).startswith("unknown_service"):
        known = known.merge(Resource({"service.name": SERVICE}))
    provider = TracerProvider(resource=known, shutdown_on_exit=False)
    traces = None if endpoint is None else traces_url(endpoint)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=traces)))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # it would wait for a collector that does not answer
        end = threading.Thread(target=provider.shutdown, daemon=True)
        end.start()
        end.join(FLUSH_S)


def _method(record: Record) -> str:
    """One of a few, whatever strangers send."""
    return record.method if record.method in METHODS else "_OTHER"


def _carrier(headers: Headers) -> dict[str, str]:
    """The headers of a trace, as far as they are taken."""
    given = {name: headers.get(name, "") for name in ("traceparent", "tracestate")}
    if len(given["tracestate"]) > MAX_TRACESTATE:
        del given["tracestate"]
    return {name: value for name, value in given.items() if value}


def _tracer() -> trace.Tracer:
    return trace.get_tracer("regionspot", __version__)


def _describe(span: trace.Span, record: Record) -> None:
    attributes: dict[str, str | int | None] = {
        "http.request.method": _method(record),
        "http.route": record.route,
        "http.response.status_code": record.status,
        "client.address": record.client,
        "regionspot.caller": record.caller,
        "regionspot.code": record.code,
        "regionspot.request_id": record.request_id,
        "regionspot.regions": record.regions,
        "regionspot.words": record.words,
        "regionspot.image_bytes": record.image_bytes,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    if record.code != "OK":
        span.set_attribute("error.type", record.code)
    if record.status >= 500:
        span.set_status(StatusCode.ERROR)
    now, now_s = time.time_ns(), time.monotonic()
    began = record.began
    for name, seconds in record.stages_s.items():
        ended = began + seconds
        if name != "model":  # has spans of its own
            stage = _tracer().start_span(name, start_time=_wall(began, now, now_s))
            stage.end(_wall(ended, now, now_s))
        began = ended


def _wall(monotonic_s: float, now: int, now_s: float) -> int:
    """Nanoseconds since 1970 of a time of the monotonic clock."""
    return now - round((now_s - monotonic_s) * 1e9)
