"""What is said about each request: a line of JSON on stderr, and Prometheus' metrics. Never a
picture or the token.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers

from regionspot.serving.gateway.admission import AdmissionQueue

logger = logging.getLogger(__name__)

ROUTES = (
    "/",
    "/v1/recognize",
    "/v1/info",
    "/v1/vocabularies",
    "/openapi.json",
    "/healthz",
    "/readyz",
    "/metrics",
)
FOLDERS = ("/static", "/v1/vocabularies")
QUIET_ROUTES = ("/", "/static", "/openapi.json", "/healthz", "/readyz", "/metrics")
"""Asked by machines and browsers all the time: logged at level DEBUG where they succeed."""

STAGES = ("room", "body", "turn", "model")
"""Where a recognition's time goes: waiting for memory, receiving and checking the request, waiting
for a turn, and the model server.
"""

NOBODY = "-"
MAX_LOGGED_PATH = 200
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Record:
    """One request, filled in as it goes.

    Args:
        client: the address that it comes from.
        caller: the name of its token; NOBODY before it was shown.
        code: "OK", one of `regionspot.serving.contract.CODES`, or "CLIENT_GONE".
        regions, words, image_bytes: that were asked about and sent; None before they are known.
        stages_s: seconds of each of STAGES that it came to.
        server_stages_s: of "model", the seconds of each of `regionspot.serving.contract.STAGES`.
        trace_id: of the trace that it belongs to, where one is recorded.
        detail: what went wrong inside, for the log alone.
    """

    request_id: str
    method: str
    path: str
    client: str = ""
    caller: str = NOBODY
    began: float = field(default_factory=time.monotonic)
    lapped: float = field(default_factory=time.monotonic)
    status: int = 0
    code: str = "OK"
    regions: int | None = None
    words: int | None = None
    image_bytes: int | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    server_stages_s: Mapping[str, float] = field(default_factory=dict)
    trace_id: str | None = None
    detail: str | None = None

    @classmethod
    def of(cls, scope: Any, client_of: Callable[[str, Headers], str]) -> Record:
        """Of an ASGI scope. The caller's X-Request-ID is taken if it is short and plain."""
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        peer = scope.get("client") or ("", 0)
        client = client_of(str(peer[0]), headers)
        return cls(request_id, str(scope["method"]), str(scope["path"]), client)

    @property
    def took_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def took_ms(self) -> float:
        return round(self.took_s * 1e3, 1)

    @property
    def route(self) -> str:
        """For labels: one of a few, whatever strangers ask for."""
        if self.path in ROUTES:
            return self.path
        return next((name for name in FOLDERS if self.path.startswith(f"{name}/")), "other")

    def lap(self, stage: str) -> None:
        """Takes down that one of STAGES is over, which began where the one before ended."""
        now = time.monotonic()
        self.stages_s[stage], self.lapped = now - self.lapped, now

    def log(self) -> None:
        """Logs the request; `JsonFormatter` writes the fields."""
        fields = {
            "request_id": self.request_id,
            "client": self.client,
            "caller": self.caller,
            "method": self.method,
            "path": self.path[:MAX_LOGGED_PATH],
            "status": self.status,
            "code": self.code,
            "took_ms": self.took_ms,
            "trace_id": self.trace_id,
            **_in_ms(self.stages_s),
            **_in_ms(self.server_stages_s),
            "regions": self.regions,
            "words": self.words,
            "image_bytes": self.image_bytes,
            "detail": self.detail,
        }
        quiet = self.route in QUIET_ROUTES and self.code == "OK"
        level = logging.DEBUG if quiet else logging.INFO
        message = f"{self.method} {self.path[:MAX_LOGGED_PATH]}: {self.status}"
        logger.log(level, message, extra={"fields": fields})


class Metrics:
    """Prometheus' metrics of one gateway, in a registry of their own."""

    def __init__(self, turns: AdmissionQueue, upstream_is_up: Callable[[], bool]) -> None:
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
        self._callers = Counter(
            "regionspot_gateway_caller_requests",
            "Recognitions by the name of their token and code",
            ["caller", "code"],
            registry=registry,
        )
        self._stages = Counter(
            "regionspot_gateway_stage_seconds",
            f"Seconds that recognitions spent in each stage: {', '.join(STAGES)}",
            ["stage"],
            registry=registry,
        )
        self._shed = Counter(
            "regionspot_gateway_shed", "Requests refused because too many wait", registry=registry
        )
        self.gauge("regionspot_gateway_in_flight", "Requests that Triton works on").set_function(
            lambda: turns.in_flight
        )
        self.gauge(
            "regionspot_gateway_waiting", "Requests that arrive, or wait for a turn"
        ).set_function(lambda: turns.waiting)
        self.gauge(
            "regionspot_gateway_buffered_bytes", "Bodies in memory, or reserved for"
        ).set_function(lambda: turns.buffered_bytes)
        self.gauge(
            "regionspot_gateway_upstream_up", "Whether the model server answers"
        ).set_function(upstream_is_up)

    def gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, registry=self._registry)

    def count(self, record: Record) -> None:
        self._requests.labels(record.route, record.code).inc()
        self._latency.labels(record.route).observe(record.took_s)
        if record.route == "/v1/recognize":
            self._callers.labels(record.caller, record.code).inc()
        for name, spent in record.stages_s.items():
            self._stages.labels(name).inc(spent)
        if record.code == "OVERLOADED":
            self._shed.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _in_ms(stages_s: Mapping[str, float]) -> dict[str, float]:
    """Fields of a log line."""
    return {f"{name}_ms": round(spent * 1e3, 1) for name, spent in stages_s.items()}
