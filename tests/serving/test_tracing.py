"""Traces: one of a request, from the caller through the gateway to Triton's stages."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from regionspot.errors import InputError
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import STAGES, ServingError
from regionspot.serving.gateway import GatewaySettings
from regionspot.serving.records import running_server
from regionspot.serving.server import ServerOptions
from regionspot.serving.tracing import trace_headers
from tests.serving.collector import Collector, Span
from tests.serving.gateways import (
    GOOD,
    PICTURE,
    Moody,
    ask,
    closed_port,
    log_lines,
    running,
    until,
)

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = (f"00-{TRACE}-{CALLER}-{flags}" for flags in ("01", "00"))


@pytest.fixture(scope="module")
def provider() -> TracerProvider:
    """Of this process, which can have one."""
    provider = TracerProvider()
    trace.set_tracer_provider(provider)
    return provider


@pytest.fixture(scope="module")
def exporter(provider: TracerProvider) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    """Those that end during a test."""
    exporter.clear()
    return exporter


def finished(spans: InMemorySpanExporter, count: int) -> dict[str, ReadableSpan]:
    """By name."""
    until(lambda: len(spans.get_finished_spans()) >= count)
    found = {span.name: span for span in spans.get_finished_spans()}
    assert len(found) == len(spans.get_finished_spans()) == count
    return found


def test_a_request_and_its_stages(
    spans: InMemorySpanExporter, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Moody()
    with running(GatewaySettings("unused:1"), lambda *_: fake) as client:
        response = ask(client, PICTURE, headers={"traceparent": SAMPLED}, **GOOD)
        found = finished(spans, 5)
    assert set(found) == {"POST /v1/recognize", "room", "body", "turn", "model"}
    request = found["POST /v1/recognize"]
    assert request.context is not None and request.parent is not None
    assert request.kind is SpanKind.SERVER
    assert (
        f"{request.context.trace_id:032x}" == TRACE and f"{request.parent.span_id:016x}" == CALLER
    )
    attributes = dict(request.attributes or {})
    assert attributes["http.response.status_code"] == 200
    assert attributes["regionspot.request_id"] == response.headers["x-request-id"]
    assert attributes["regionspot.regions"] == 1 and attributes["regionspot.code"] == "OK"
    assert request.status.status_code is StatusCode.UNSET
    began, ended = request.start_time or 0, request.end_time or 0
    at = began
    for name in ("room", "body", "turn"):
        stage = found[name]
        assert stage.parent is not None and stage.parent.span_id == request.context.span_id
        # two clocks are compared, of which one is adjusted
        assert (stage.start_time or 0) >= at - 50_000_000, name
        at = stage.end_time or 0
    assert at <= ended + 50_000_000
    assert found["model"].kind is SpanKind.CLIENT
    [line] = [line for line in log_lines(capsys) if line["path"] == "/v1/recognize"]
    assert line["trace_id"] == TRACE


def test_a_long_state_of_the_trace_is_left_out(spans: InMemorySpanExporter) -> None:
    for length, kept in ((100, 1), (600, 0)):
        spans.clear()
        headers = {"traceparent": SAMPLED, "tracestate": f"a={'b' * length}"}
        with running(GatewaySettings("unused:1"), lambda *_: Moody()) as client:
            assert ask(client, PICTURE, headers=headers, **GOOD).status_code == 200
            request = finished(spans, 5)["POST /v1/recognize"]
        assert request.context is not None and len(request.context.trace_state) == kept


@pytest.mark.parametrize("given", ["", "00-0-0-01", "x" * 5000, f"00-{'0' * 32}-{CALLER}-01"])
def test_a_context_that_is_none_begins_a_trace(spans: InMemorySpanExporter, given: str) -> None:
    with running(GatewaySettings("unused:1"), lambda *_: Moody()) as client:
        assert ask(client, PICTURE, headers={"traceparent": given}, **GOOD).status_code == 200
        request = finished(spans, 5)["POST /v1/recognize"]
    assert request.parent is None


def test_what_the_caller_does_not_sample_is_not_recorded(
    spans: InMemorySpanExporter, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(GatewaySettings("unused:1"), lambda *_: Moody()) as client:
        assert ask(client, PICTURE, headers={"traceparent": NOT_SAMPLED}, **GOOD).status_code == 200
    assert not spans.get_finished_spans()
    [line] = [line for line in log_lines(capsys) if line["path"] == "/v1/recognize"]
    assert "trace_id" not in line


def test_probes_and_pages_are_not_traced(spans: InMemorySpanExporter) -> None:
    with running(GatewaySettings("unused:1"), lambda *_: Moody()) as client:
        for path in ("/healthz", "/readyz", "/metrics", "/", "/static/style.css"):
            assert client.get(path).status_code == 200
        client.get("/v1/vocabularies/none-of-that-name")
        assert set(finished(spans, 1)) == {"GET /v1/vocabularies"}


def test_failures_are_marked(spans: InMemorySpanExporter) -> None:
    fake = Moody()
    with running(GatewaySettings("unused:1"), lambda *_: fake) as client:
        assert ask(client, PICTURE, boxes=[[1, 2]], words=["cat"]).status_code == 400
        refused = finished(spans, 2)["POST /v1/recognize"]
        spans.clear()
        fake.failure = ServingError("INTERNAL", "it broke")
        assert ask(client, PICTURE, **GOOD).status_code == 500
        found = finished(spans, 5)
    # the caller's mistake is no failure of this service
    assert refused.status.status_code is StatusCode.UNSET
    assert (refused.attributes or {})["error.type"] == "REQUEST_INVALID"
    assert found["POST /v1/recognize"].status.status_code is StatusCode.ERROR
    assert found["model"].status.status_code is StatusCode.ERROR
    assert (found["model"].attributes or {})["error.type"] == "INTERNAL"


@contextmanager
def gateway_process(
    triton: str, *options: str
) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    port = closed_port()
    command = [sys.executable, "-m", "regionspot.cli.main", "serve", "web", "--url", triton]
    process = subprocess.Popen(
        [*command, "--port", str(port), *options], stderr=subprocess.PIPE, text=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until(lambda: process.poll() is not None or _is_up(client))
            yield client, process
    finally:
        process.kill()
        process.wait()


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_from_a_caller_to_the_stages_of_triton(
    provider: TracerProvider, repository: Path, home: Path, picture: Path
) -> None:
    """The real gateway and server, which send their spans to a collector."""
    with (
        Collector() as collector,
        running_server(repository, home, ServerOptions(otlp_endpoint=collector.url)) as record,
        gateway_process(record.ports.grpc_url, "--otlp-endpoint", collector.url) as (
            client,
            process,
        ),
        trace.get_tracer("test").start_as_current_span("caller") as caller,
    ):
        context = caller.get_span_context()
        url = str(client.base_url)
        with RegionClient(url) as from_outside:
            from_outside.recognize(picture, [[10, 10, 60, 60]], "mini")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        until(
            lambda: len([one for one in collector.named("InferRequest") if _of(one, context)]) == 1
        )
    own = [span for span in collector.spans if _of(span, context)]
    [request] = [span for span in own if span.name == "POST /v1/recognize"]
    [model] = [span for span in own if span.name == "model"]
    [inference] = [span for span in own if span.name == "InferRequest"]
    assert request.parent == f"{context.span_id:016x}"
    assert model.parent == request.id and inference.parent == model.id
    assert (request.service, model.service) == ("regionspot-gateway",) * 2
    assert inference.service == "regionspot-triton"
    stages = [span for span in own if span.parent == model.id and span.service == model.service]
    assert {span.name for span in stages} == set(STAGES)
    assert model.start <= min(span.start for span in stages)
    assert max(span.end for span in stages) <= model.end
    for first, second in pairwise(stages):
        assert first.end == second.start


def _of(span: Span, context: trace.SpanContext) -> bool:
    return span.trace == f"{context.trace_id:032x}"


@pytest.mark.parametrize("listens", [False, True])
def test_a_collector_that_does_not_answer_holds_nothing_up(listens: bool) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        check_that_it_ends(f"http://127.0.0.1:{silent.getsockname()[1]}")


def check_that_it_ends(nowhere: str) -> None:
    with gateway_process(f"127.0.0.1:{closed_port()}", "--otlp-endpoint", nowhere) as (
        client,
        process,
    ):
        assert client.get("/v1/info").status_code == 503
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 20
    assert process.returncode == 0
    assert all(json.loads(line) for line in errors.splitlines())


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "", "http://"])
def test_an_endpoint_must_be_a_url(endpoint: str) -> None:
    for settings in (
        lambda: GatewaySettings("a:1", otlp_endpoint=endpoint),
        lambda: ServerOptions(otlp_endpoint=endpoint),
    ):
        with pytest.raises(InputError, match="such as http://collector:4318"):
            settings()


def test_without_the_sdk_the_option_is_refused() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from regionspot.cli.main import main\n"
        "sys.exit(main(['serve', 'web', '--port', '0', '--otlp-endpoint', 'http://x:4318']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install 'regionspot[tracing]'" in done.stderr


def test_no_span_no_header() -> None:
    assert trace_headers() == {}
