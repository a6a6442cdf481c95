"""A collector of OpenTelemetry's traces on loopback."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Span:
    """IDs are in hexadecimal; `parent` is empty at a root."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    is_error: bool


@dataclass
class Collector:
    """Takes spans by OTLP over HTTP, in protobuf and in JSON, while used as a context manager."""

    spans: list[Span] = field(default_factory=list)

    def __enter__(self) -> Collector:
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces", self.path
                spans.extend(_spans_in(body, self.headers["Content-Type"]))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def _spans_in(body: bytes, content_type: str) -> list[Span]:
    if "json" in content_type:
        content = json.loads(body)
    else:
        content = MessageToDict(ExportTraceServiceRequest.FromString(body))
    return [
        _span_of(span, _values(group["resource"]["attributes"])["service.name"], content_type)
        for group in content["resourceSpans"]
        for scope in group["scopeSpans"]
        for span in scope["spans"]
    ]


def _span_of(span: dict[str, Any], service: str, content_type: str) -> Span:
    def identity(name: str) -> str:
        """protobuf's JSON has bytes in base64, OTLP's in hexadecimal."""
        text = span.get(name, "")
        if "json" in content_type:
            return text.lower()
        return base64.b64decode(text).hex()

    return Span(
        service,
        span["name"],
        identity("traceId"),
        identity("spanId"),
        identity("parentSpanId"),
        int(span["startTimeUnixNano"]),
        int(span["endTimeUnixNano"]),
        _values(span.get("attributes", [])),
        "ERROR" in str(span.get("status", {}).get("code", "")),
    )


def _values(attributes: list[dict[str, Any]]) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in attributes}
