"""What is said about each request: a line of JSON on stderr, and Prometheus' metrics. Never a
picture or the token.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers

from regionspot.serving.gateway.admission import AdmissionQueue

logger = logging.getLogger(__name__)

ROUTES = ("/", "/v1/recognize", "/v1/info", "/healthz", "/readyz", "/metrics")
MAX_LOGGED_PATH = 200
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Record:
    """One request, filled in as it goes.

    Args:
        code: "OK", one of `regionspot.serving.contract.CODES`, or "CLIENT_GONE".
        regions, image_bytes: that were asked about and sent; None before they are known.
        detail: what went wrong inside, for the log alone.
    """

    request_id: str
    method: str
    path: str
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    code: str = "OK"
    regions: int | None = None
    image_bytes: int | None = None
    detail: str | None = None

    @classmethod
    def of(cls, scope: Any) -> Record:
        """Of an ASGI scope. The caller's X-Request-ID is taken if it is short and plain."""
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        return cls(request_id, str(scope["method"]), str(scope["path"]))

    @property
    def took_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def took_ms(self) -> float:
        return round(self.took_s * 1e3, 1)

    @property
    def route(self) -> str:
        """For labels: one of a few, whatever strangers ask for."""
        return (
            self.path
            if self.path in ROUTES
            else "/static"
            if self.path.startswith("/static/")
            else "other"
        )

    def log(self) -> None:
        """Logs the request; `JsonFormatter` writes the fields."""
        fields = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path[:MAX_LOGGED_PATH],
            "status": self.status,
            "code": self.code,
            "took_ms": self.took_ms,
            "regions": self.regions,
            "image_bytes": self.image_bytes,
            "detail": self.detail,
        }
        logger.info(
            f"{self.method} {self.path[:MAX_LOGGED_PATH]}: {self.status}", extra={"fields": fields}
        )


class Metrics:
    """Prometheus' metrics of one gateway, in a registry of their own."""

    def __init__(self, turns: AdmissionQueue) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "regionspot_gateway_requests",
            "Requests by route and code",
            ["route", "code"],
            registry=registry,
        )
        self._latency = Histogram(
            "regionspot_gateway_latency_seconds",
            "From a request's header to its answer",
            ["route"],
            registry=registry,
            buckets=_BUCKETS,
        )
        in_flight = Gauge(
            "regionspot_gateway_in_flight", "Requests that Triton works on", registry=registry
        )
        in_flight.set_function(lambda: turns.in_flight)
        waiting = Gauge(
            "regionspot_gateway_waiting",
            "Requests that arrive, or wait for a turn",
            registry=registry,
        )
        waiting.set_function(lambda: turns.waiting)
        self._shed = Counter(
            "regionspot_gateway_shed", "Requests refused because too many wait", registry=registry
        )

    def count(self, record: Record) -> None:
        self._requests.labels(record.route, record.code).inc()
        self._latency.labels(record.route).observe(record.took_s)
        if record.code == "OVERLOADED":
            self._shed.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
