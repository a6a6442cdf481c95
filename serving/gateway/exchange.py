"""Around every request: its id, its record, headers of every answer, and errors as answers."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from regionspot.serving.contract import ServingError
from regionspot.serving.gateway.errors import (
    SAID_OF_FAILURES,
    HttpError,
    error_response,
    http_error,
)
from regionspot.serving.gateway.records import Metrics, Record
from regionspot.serving.gateway.tracing import request_span

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
CLIENT_GONE, CLIENT_GONE_STATUS = "CLIENT_GONE", 499
DRAIN_S, DRAIN_BYTES = 2.0, 64 << 20
_ResultT = TypeVar("_ResultT")


class Exchanges:
    """ASGI middleware: nothing gets past it but an answer, and each is counted and logged."""

    def __init__(
        self, app: Any, metrics: Metrics, client_of: Callable[[str, Headers], str]
    ) -> None:
        self._app, self._metrics, self._client_of = app, metrics, client_of

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record.of(scope, self._client_of)
        scope.setdefault("state", {})["record"] = record
        exchange = _Exchange(scope, receive, send, record)
        with request_span(scope, record):
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except (ClientDisconnect, asyncio.CancelledError) as error:
                record.status, record.code = CLIENT_GONE_STATUS, CLIENT_GONE
                if isinstance(error, asyncio.CancelledError):  # the gateway is being stopped
                    raise
            except Exception as error:
                await exchange.refuse(scope, error)
            finally:
                self._metrics.count(record)
                record.log()


class _Exchange:
    """One request's `receive` and `send`."""

    def __init__(self, scope: Any, receive: Any, send: Any, record: Record) -> None:
        self._receive, self._send, self._record = receive, send, record
        headers = Headers(scope=scope)
        self._has_read_all = (
            headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        )

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._has_read_all = True
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update({"X-Request-ID": self._record.request_id, **HEADERS})
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)

    async def refuse(self, scope: Any, error: Exception) -> None:
        """Answer with an error, unless an answer has begun."""
        told, record = http_error(error), self._record
        record.code, record.detail = told.code, _inside(error, told)
        if record.status:
            return
        response = error_response(told, record.request_id)
        if self._has_read_all:
            await response(scope, self.receive, self.send)
            return
        response.headers["Connection"] = "close"
        await self.send(
            {"type": "http.response.start", "status": told.status, "headers": response.raw_headers}
        )
        await self._send({"type": "http.response.body", "body": response.body, "more_body": True})
        await self._drain()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drain(self) -> None:
        """Throw away what is still being sent, for a while: closing on a caller who sends would cut
        off the answer.
        """
        deadline, count = time.monotonic() + DRAIN_S, 0
        while (
            not self._has_read_all
            and count < DRAIN_BYTES
            and (left_s := deadline - time.monotonic()) > 0
        ):
            try:
                message = await asyncio.wait_for(self.receive(), left_s)
            except TimeoutError:
                return
            count += len(message.get("body", b""))


async def while_connected(receive: Any, work: Awaitable[_ResultT]) -> _ResultT:
    """The result of `work`, which is cancelled when the caller goes away. The request's body must
    have been read.

    Raises:
        ClientDisconnect: the caller has gone.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnect
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnection(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _inside(error: Exception, told: HttpError) -> str | None:
    """What the log says beyond the code: all of an unexpected error, the reason of a failure."""
    if told.code not in SAID_OF_FAILURES or isinstance(error, HttpError):
        return None
    if isinstance(error, ServingError):
        return str(error)
    return "".join(traceback.format_exception(error))
