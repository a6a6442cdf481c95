"""The gateway's routes, and how it is run."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from regionspot.logs import JsonFormatter, log_to
from regionspot.serving.client import AsyncRegionClient
from regionspot.serving.contract import Limits
from regionspot.serving.gateway.admission import AdmissionQueue
from regionspot.serving.gateway.errors import HttpError, error_response, http_error
from regionspot.serving.gateway.exchange import Exchanges, while_connected
from regionspot.serving.gateway.form import (
    FORM_SLACK_BYTES,
    Form,
    check_headers,
    question_of,
    read_form,
)
from regionspot.serving.gateway.records import Metrics, Record
from regionspot.serving.gateway.settings import GatewaySettings
from regionspot.serving.gateway.upstream import Connect, Upstream
from regionspot.serving.messages import Answer, Question

WEB = Path(__file__).resolve().parents[1] / "web"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
UPLOAD_TIMEOUT_S = 60.0
"""For the whole body: who sends more slowly holds a place that others wait for."""
IDLE_S = 75
"""Before an idle connection is closed. Longer than clients and proxies keep one: who closes second
meets no request.
"""


def make_app(settings: GatewaySettings, connect: Connect = AsyncRegionClient) -> Starlette:
    """The gateway as an ASGI application. The Triton server need not be up.

    Args:
        connect: makes the client, from `settings.url` and `settings.timeout_s`.

    Raises:
        InputError: an address that is none.
    """
    gateway = Gateway(settings, connect)
    app = Starlette(
        routes=[
            Route("/", gateway.page),
            Route("/static/{name}", gateway.page),
            Route("/v1/recognize", gateway.recognize, methods=["POST"]),
            Route("/v1/info", gateway.info),
            Route("/v1/vocabularies/{name:path}", gateway.vocabulary),
            Route("/healthz", gateway.health),
            Route("/readyz", gateway.ready),
            Route("/metrics", gateway.metrics),
        ],
        middleware=[Middleware(Exchanges, metrics=gateway.counted)],
        exception_handlers={HTTPException: _no_such_route},
        lifespan=gateway.lifespan,
    )
    app.router.redirect_slashes = False
    return app


def run(settings: GatewaySettings, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serve until SIGINT or SIGTERM; then take no more requests, and finish those under way within
    `timeout_s`.
    """
    import uvicorn

    uvicorn.run(make_app(settings), host=host, port=port, **server_options(settings))


def server_options(settings: GatewaySettings) -> dict[str, Any]:
    """uvicorn's options."""
    return {
        "access_log": False,
        "log_level": "warning",
        "server_header": False,
        "timeout_keep_alive": IDLE_S,
        "timeout_graceful_shutdown": math.ceil(settings.timeout_s) + 1,
        "ws": "none",
    }


class Gateway:
    """The endpoints, and what they share."""

    def __init__(self, settings: GatewaySettings, connect: Connect) -> None:
        self._settings = settings
        self._turns = AdmissionQueue(settings.concurrency, settings.max_waiting)
        self._upstream = Upstream(settings.url, settings.timeout_s, connect)
        self._files = {
            path.name: path.read_bytes() for path in WEB.iterdir() if path.suffix in MEDIA_TYPES
        }
        self.counted = Metrics(self._turns)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        with log_to("stderr", JsonFormatter()):
            yield
        await self._upstream.close()

    async def page(self, request: Request) -> Response:
        """A file of the web page. They are few, and were read at the start: no path of a stranger's
        is opened.
        """
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            raise HTTPException(404)
        content = self._files[name]
        headers = {"ETag": f'"{sha256(content).hexdigest()[:32]}"', "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=MEDIA_TYPES[Path(name).suffix])

    async def recognize(self, request: Request) -> Response:
        """Names of regions of a picture."""
        self._authorize(request)
        record: Record = request.state.record
        with self._turns.place():
            limits = (await self._upstream.info()).limits
            form = await self._read(request, limits, record)
            # numbers and words by the thousand: not on the event loop
            question = await asyncio.to_thread(question_of, form, limits)
            record.regions = question.num_regions
            answer = await while_connected(
                request.receive, self._answer(question, record.request_id)
            )
            return await asyncio.to_thread(_json_of, answer, form.file_name, record)

    async def info(self, request: Request) -> Response:
        """What the server runs, and what it takes."""
        self._authorize(request)
        info = await self._upstream.info()
        limits = info.limits.to_json() | {"max_body_bytes": self._max_body_bytes(info.limits)}
        return JSONResponse(
            {
                "model": info.model,
                "runtime": info.runtime,
                "precision": info.precision,
                "vocabularies": [
                    {"name": name, "words": len(words)} for name, words in info.vocabularies.items()
                ],
                "limits": limits,
            }
        )

    async def vocabulary(self, request: Request) -> Response:
        """The words of a registered vocabulary, in the order of their class ids."""
        self._authorize(request)
        name = request.path_params["name"]
        words = (await self._upstream.info()).vocabularies.get(name)
        if words is None:
            raise HttpError(
                "VOCABULARY_UNKNOWN", "no vocabulary of that name is registered", status=404
            )
        return JSONResponse({"name": name, "words": list(words)})

    async def health(self, request: Request) -> Response:
        """That the process lives, whatever Triton does."""
        return JSONResponse({"alive": True})

    async def ready(self, request: Request) -> Response:
        """Whether questions are answered: one was, not long ago. Probes carry no token, and learn
        no more than that.
        """
        try:
            await self._upstream.check()
        except Exception as error:
            record: Record = request.state.record
            record.detail = str(error)
            told = http_error(error)
            record.code = "UNAVAILABLE"
            return error_response(
                HttpError("UNAVAILABLE", str(told), headers=told.headers), record.request_id
            )
        return JSONResponse({"ready": True})

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text."""
        self._authorize(request)
        return Response(self.counted.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _authorize(self, request: Request) -> None:
        """Raises HttpError 401 unless the token was shown, in a time that does not tell how much of
        it was right.
        """
        token = self._settings.token
        if token is None:
            return
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            shown.strip().encode(), token.encode()
        ):
            raise HttpError(
                "UNAUTHORIZED",
                "this gateway wants its token: send the header Authorization: Bearer TOKEN",
                headers={"WWW-Authenticate": 'Bearer realm="regionspot"'},
            )

    async def _read(self, request: Request, limits: Limits, record: Record) -> Form:
        max_bytes = self._max_body_bytes(limits)
        check_headers(request, max_bytes)
        try:
            form = await asyncio.wait_for(read_form(request, max_bytes), UPLOAD_TIMEOUT_S)
        except TimeoutError as error:
            raise HttpError(
                "TIMEOUT", f"the request did not arrive within {UPLOAD_TIMEOUT_S:.0f} s", 408
            ) from error
        record.image_bytes = None if form.image is None else len(form.image)
        return form

    async def _answer(self, question: Question, request_id: str) -> Answer:
        timeout_s = self._settings.timeout_s
        deadline = time.monotonic() + timeout_s

        async def in_turn() -> Answer:
            async with self._turns.turn():
                return await self._upstream.ask(
                    question, request_id, max(deadline - time.monotonic(), 0.001)
                )

        try:
            return await asyncio.wait_for(in_turn(), timeout_s)
        except TimeoutError as error:
            raise HttpError(
                "TIMEOUT", f"no answer within {timeout_s:g} s: try again, or ask for less at once"
            ) from error

    def _max_body_bytes(self, limits: Limits) -> int:
        return self._settings.max_body_bytes or limits.max_image_bytes + FORM_SLACK_BYTES


def _json_of(answer: Answer, file_name: str, record: Record) -> Response:
    content: dict[str, Any] = answer.predictions.to_json(file_name)
    content |= {"image_handle": answer.image.handle, "cached": answer.cached}
    return JSONResponse(content | {"request_id": record.request_id, "took_ms": record.took_ms})


async def _no_such_route(request: Request, error: Exception) -> Response:
    """Starlette's own errors, 404 and 405, in the form of all others."""
    assert isinstance(error, HTTPException)
    said = {404: "there is nothing at this address", 405: "this address does not take that method"}
    message = said.get(error.status_code, "the request cannot be used")
    raise HttpError("REQUEST_INVALID", message, error.status_code, error.headers)
