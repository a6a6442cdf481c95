"""The gateway's routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sized
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
from regionspot.serving.contract import Limits, RequestError, version_of
from regionspot.serving.gateway.admission import AdmissionQueue, Share
from regionspot.serving.gateway.errors import HttpError, error_response, http_error
from regionspot.serving.gateway.exchange import Exchanges, while_connected
from regionspot.serving.gateway.fleet import Fleet
from regionspot.serving.gateway.form import (
    FORM_SLACK_BYTES,
    Form,
    check_headers,
    declared_bytes,
    question_of,
    read_form,
    too_large,
    words_of,
)
from regionspot.serving.gateway.handles import HandleSeal
from regionspot.serving.gateway.openapi import description
from regionspot.serving.gateway.records import Metrics, Record
from regionspot.serving.gateway.settings import GatewaySettings
from regionspot.serving.gateway.sites import Proxies, Sites
from regionspot.serving.gateway.tokens import ANONYMOUS, Caller, Callers, unauthorized
from regionspot.serving.gateway.upstream import Connect
from regionspot.serving.gateway.vocabularies import LiveVocabularies
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

REFRESH_S = 5.0
"""How often files are looked at that are read again when they change."""


def make_app(settings: GatewaySettings, connect: Connect | None = None) -> Starlette:
    """The gateway as an ASGI application; its `state.gateway` is the `Gateway`. The Triton server
    need not be up.

    Args:
        connect: makes the client, from `settings.url` and `settings.timeout_s`; an
            `AsyncRegionClient` unless told otherwise.

    Raises:
        InputError: an address that is none, a file of tokens that cannot be used.
    """
    gateway = Gateway(settings, connect)
    proxies = Proxies(settings.trusted_proxies)
    app = Starlette(
        routes=[
            Route("/", gateway.page),
            Route("/static/{name}", gateway.page),
            Route("/openapi.json", gateway.openapi),
            Route("/v1/recognize", gateway.recognize, methods=["POST"]),
            Route("/v1/info", gateway.info),
            Route("/v1/vocabularies", gateway.vocabularies),
            Route(
                "/v1/vocabularies/{name:path}",
                gateway.vocabulary,
                methods=["GET", "PUT", "DELETE"],
            ),
            Route("/healthz", gateway.health),
            Route("/readyz", gateway.ready),
            Route("/metrics", gateway.metrics),
        ],
        middleware=[Middleware(Exchanges, metrics=gateway.counted, client_of=proxies.client_of)],
        exception_handlers={HTTPException: _no_such_route},
        lifespan=gateway.lifespan,
    )
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return app


class Gateway:
    """The endpoints, and what they share."""

    def __init__(self, settings: GatewaySettings, connect: Connect | None) -> None:
        self._settings = settings
        self._callers, self._sites = Callers(settings), Sites(settings)
        self._turns = AdmissionQueue(
            settings.concurrency, settings.max_waiting, settings.max_buffered_bytes
        )
        self._fleet = Fleet(settings, connect)
        self._files = {
            path.name: path.read_bytes() for path in WEB.iterdir() if path.suffix in MEDIA_TYPES
        }
        self._words = LiveVocabularies(settings.vocabularies, self._fleet)
        self._refreshers: list[Callable[[], None]] = []
        self.counted = Metrics(self._turns, lambda: self._fleet.state == "up")

    def show_connections(self, connections: Sized) -> None:
        """Has the metrics tell how many there are."""
        gauge = self.counted.gauge("regionspot_gateway_connections", "Open connections")
        gauge.set_function(lambda: len(connections))

    def refresh_also(self, refresh: Callable[[], None]) -> None:
        """Calls a function every REFRESH_S while the gateway runs."""
        self._refreshers.append(refresh)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        with log_to("stderr", JsonFormatter()):
            tasks = [asyncio.create_task(self._fleet.watch())]
            tasks.append(asyncio.create_task(self._refresh()))
            tasks.append(asyncio.create_task(self._words.watch()))
            yield
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._words.close()
        await self._fleet.close()

    async def _refresh(self) -> None:
        while True:
            for refresh in self._refreshers:
                refresh()
            await asyncio.sleep(REFRESH_S)

    async def page(self, request: Request) -> Response:
        """A file of the web page. They are few, and were read at the start: no path of a stranger's
        is opened.
        """
        self._sites.check_host(request.headers)
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            raise HTTPException(404)
        content = self._files[name]
        headers = {"ETag": f'"{sha256(content).hexdigest()[:32]}"', "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=MEDIA_TYPES[Path(name).suffix])

    async def openapi(self, request: Request) -> Response:
        """The description of this API."""
        self._sites.check_host(request.headers)
        return JSONResponse(description())

    async def recognize(self, request: Request) -> Response:
        """Names of regions of a picture."""
        caller = self._caller_of(request)
        meter = self._callers.meter(caller)
        meter.take_request()
        record: Record = request.state.record
        share, seal = self._share_of(caller, record), HandleSeal(caller.handle_key)
        with self._turns.place(share):
            info = await self._fleet.info()
            limits = info.limits
            max_bytes = self._max_body_bytes(limits)
            check_headers(request, max_bytes)
            async with self._turns.room(share, declared_bytes(request, max_bytes)) as room:
                record.lap("room")
                form = await self._read(request, max_bytes, seal, record)
                room.shrink(form.num_bytes)
                # numbers and words by the thousand: not on the event loop
                question = await asyncio.to_thread(question_of, form, limits, seal)
                record.lap("body")
                words = question.vocabulary if isinstance(question.vocabulary, tuple) else ()
                meter.take_words(words)
                resolved = self._words.resolve(question, info)
                record.regions, record.words = question.num_regions, len(words)
                try:
                    answer = await while_connected(
                        request.receive, self._answer(resolved, share, record)
                    )
                except RequestError as error:
                    told = self._words.why_refused(error, question.vocabulary, info)
                    if told is error:
                        raise
                    raise told from error
                meter.remember(words)
                return await asyncio.to_thread(_json_of, answer, form.file_name, seal, record)

    async def info(self, request: Request) -> Response:
        """What the server runs, and what it takes."""
        self._caller_of(request)
        info = await self._fleet.info()
        limits = info.limits.to_json() | {"max_body_bytes": self._max_body_bytes(info.limits)}
        return JSONResponse(
            {
                "model": info.model,
                "runtime": info.runtime,
                "precision": info.precision,
                "model_version": info.version,
                "vocabularies": self._words.list(info),
                "limits": limits,
            }
        )

    async def vocabularies(self, request: Request) -> Response:
        """All vocabularies, without their words."""
        self._caller_of(request)
        return JSONResponse({"vocabularies": self._words.list(await self._fleet.info())})

    async def vocabulary(self, request: Request) -> Response:
        """The words of a vocabulary, in the order of their class ids; PUT and DELETE change it."""
        caller, name = self._caller_of(request), request.path_params["name"]
        info = await self._fleet.info()
        if request.method in ("GET", "HEAD"):
            return JSONResponse(self._words.show(name, info))
        if not caller.may_edit_vocabularies:
            raise HttpError("FORBIDDEN", "this token changes no vocabularies")
        if request.method == "DELETE":
            self._words.delete(name, info)
            return Response(status_code=204)
        words = words_of(await self._body(request))
        self._callers.meter(caller).take_words(words)
        is_new = self._words.put(name, words, info)
        return JSONResponse(self._words.show(name, info), 201 if is_new else 200)

    async def health(self, request: Request) -> Response:
        """That the process lives, whatever Triton does."""
        return JSONResponse({"alive": True})

    async def ready(self, request: Request) -> Response:
        """That this process answers, if only that the model server cannot; with ?upstream=1, that
        the model server does. Probes carry no token, and learn no more than that.
        """
        if request.query_params.get("upstream", "0") != "0":
            try:
                await self._fleet.check()
            except Exception as error:
                record: Record = request.state.record
                record.detail = str(error)
                told = http_error(error)
                record.code = "UNAVAILABLE"
                return error_response(
                    HttpError("UNAVAILABLE", str(told), headers=told.headers), record.request_id
                )
        return JSONResponse({"ready": True, "upstream": self._fleet.state})

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text. Prometheus asks by address: whoever shows a token may use any name."""
        caller = self._identified(request, by_any_name=True)
        if not self._callers.may_read_metrics(caller):
            if caller.name == ANONYMOUS:
                raise unauthorized()
            raise HttpError("FORBIDDEN", "this token does not open the metrics")
        return Response(self.counted.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _identified(self, request: Request, by_any_name: bool = False) -> Caller:
        """Who asks, if from a place where it may.

        Args:
            by_any_name: names of the gateway are checked only for who shows no token.
        """
        caller = self._callers.identify(request.headers.get("authorization", ""))
        if caller.name == ANONYMOUS or not by_any_name:
            self._sites.check_host(request.headers)
        self._sites.check_site(request.headers)
        record: Record = request.state.record
        record.caller = caller.name
        return caller

    def _caller_of(self, request: Request) -> Caller:
        """Who asks about the model."""
        caller = self._identified(request)
        if not caller.may_ask:
            raise HttpError("FORBIDDEN", "this token opens the metrics alone")
        return caller

    def _share_of(self, caller: Caller, record: Record) -> Share:
        """What is counted as one caller: a name, or an address where all have the same name. No
        one of several names gets everything.
        """
        if not caller.named:
            return Share(record.client)
        chosen, most = self._settings, caller.quota.concurrency
        if not self._callers.are_several:
            return Share(caller.name, most)
        places = chosen.concurrency + chosen.max_waiting
        return Share(
            caller.name,
            max_in_flight=most or max(chosen.concurrency - 1, 1),
            max_places=max(places // 2, 1),
            max_bytes=chosen.max_buffered_bytes // 2,
        )

    async def _body(self, request: Request) -> bytes:
        """A body that is no form; raises HttpError 413, or 408 where it does not come."""
        parts, count = [], 0
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                async for part in request.stream():
                    parts.append(part)
                    count += len(part)
                    if count > FORM_SLACK_BYTES:
                        raise too_large(FORM_SLACK_BYTES)
        except TimeoutError as error:
            raise _too_late() from error
        return b"".join(parts)

    async def _read(
        self, request: Request, max_bytes: int, seal: HandleSeal, record: Record
    ) -> Form:
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                form = await read_form(request, max_bytes, seal.suffix)
        except TimeoutError as error:
            raise _too_late() from error
        record.image_bytes = None if form.image is None else len(form.image) - len(seal.suffix)
        return form

    async def _answer(self, question: Question, share: Share, record: Record) -> Answer:
        timeout_s = self._settings.timeout_s
        deadline = time.monotonic() + timeout_s
        num_bytes = len(question.image) if isinstance(question.image, bytes) else 0
        try:
            async with asyncio.timeout(timeout_s), self._turns.turn(share, num_bytes):
                record.lap("turn")
                left_s = max(deadline - time.monotonic(), 0.001)
                answer = await self._fleet.ask(question, record.request_id, left_s)
                record.lap("model")
                record.server_stages_s = answer.stage_seconds
                return answer
        except TimeoutError as error:
            raise HttpError(
                "TIMEOUT", f"no answer within {timeout_s:g} s: try again, or ask for less at once"
            ) from error

    def _max_body_bytes(self, limits: Limits) -> int:
        return self._settings.max_body_bytes or limits.max_image_bytes + FORM_SLACK_BYTES


def _too_late() -> HttpError:
    return HttpError("TIMEOUT", f"the request did not arrive within {UPLOAD_TIMEOUT_S:.0f} s", 408)


def _json_of(answer: Answer, file_name: str, seal: HandleSeal, record: Record) -> Response:
    content: dict[str, Any] = answer.predictions.to_json(file_name)
    content |= {
        "image_handle": seal.seal(answer.image.handle),
        "cached": answer.cached,
        "model_version": answer.model_version,
        "vocabulary_version": version_of(answer.predictions.class_names),
    }
    return JSONResponse(content | {"request_id": record.request_id, "took_ms": record.took_ms})


async def _no_such_route(request: Request, error: Exception) -> Response:
    """Starlette's own errors, 404 and 405, in the form of all others."""
    assert isinstance(error, HTTPException)
    said = {404: "there is nothing at this address", 405: "this address does not take that method"}
    message = said.get(error.status_code, "the request cannot be used")
    raise HttpError("REQUEST_INVALID", message, error.status_code, error.headers)
