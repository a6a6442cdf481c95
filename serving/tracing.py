"""What clients, gateway and server share of OpenTelemetry: how a call says to which trace it
belongs (W3C Trace Context), and where traces go.
"""

from __future__ import annotations

import re

from regionspot.errors import InputError, shown

try:
    from opentelemetry.trace.propagation import tracecontext
except ImportError:  # who traces has it
    tracecontext = None  # type: ignore[assignment]


def trace_headers() -> dict[str, str]:
    """Headers, or gRPC metadata, that name the span under way: `traceparent` and `tracestate`.
    Empty outside of a span, and where OpenTelemetry is not installed.
    """
    headers: dict[str, str] = {}
    if tracecontext is not None:
        tracecontext.TraceContextTextMapPropagator().inject(headers)
    return headers


def traces_url(endpoint: str) -> str:
    """Where a collector at `endpoint` takes traces by OTLP over HTTP.

    Raises:
        InputError: it is no URL.
    """
    if not re.fullmatch(r"https?://[^/\s]\S*", endpoint):
        raise InputError(
            "the collector of traces must be a URL such as http://collector:4318, not "
            f"{shown(endpoint)}"
        )
    return f"{endpoint.rstrip('/')}/v1/traces"
