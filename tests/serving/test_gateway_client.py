"""Our clients over a gateway, TLS and proxies: the answers of Triton itself, to the bit, and an
understandable error for everything that can stand between.
"""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regionspot.cli.main import main
from regionspot.errors import InputError
from regionspot.serving.address import Address, Credentials
from regionspot.serving.client import AsyncRegionClient, RegionClient, make_question
from regionspot.serving.contract import RequestError, ServingError
from regionspot.serving.gateway import GatewaySettings
from regionspot.serving.http_connection import HttpConnection
from regionspot.serving.messages import Answer, Question, RemoteImage
from regionspot.serving.protocols import HttpRequest
from regionspot.serving.records import ServerRecord
from regionspot.serving.triton import pipeline_from_triton
from tests.serving.network import (
    Canned,
    Certificates,
    Forwarder,
    gateway,
    http_answer,
    make_certificates,
    server_context,
)

TOKEN = "correct-horse-battery-staple"
BOX = [[5.1, 5.3, 90.7, 90.123]]
UNKNOWN_HANDLE = "0" * 64


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def url(server: ServerRecord) -> Iterator[str]:
    """A gateway that lets everybody in."""
    with gateway(GatewaySettings(server.ports.grpc_url)) as address:
        yield address


@pytest.fixture(scope="module")
def guarded(server: ServerRecord, certificates: Certificates) -> Iterator[str]:
    """One behind an ingress: TLS, a path, and a token."""
    settings = GatewaySettings(server.ports.grpc_url, token=TOKEN)
    with gateway(settings, certificates, "/below/here") as address:
        yield address


def assert_identical(found: Answer, expected: Answer) -> None:
    """To the bit, types and shapes included."""
    for field in fields(found.predictions):
        one = getattr(found.predictions, field.name)
        other = getattr(expected.predictions, field.name)
        if isinstance(other, np.ndarray):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), field.name
            assert one.tobytes() == other.tobytes(), field.name
        else:
            assert one == other, field.name
    assert found.image == expected.image


QUESTIONS: dict[str, dict[str, Any]] = {
    "boxes and masks": {
        "boxes": [*BOX, [0, 0, 33.333333, 1e2]],
        "vocabulary": ["cat", "猫", "a\u2028b", 'quote"'],
        "return_masks": True,
    },
    "clicks and a registered vocabulary": {
        "boxes": BOX,
        "points": [[[10, 10], [20, 20.5]]],
        "point_labels": [[1, 0]],
        "vocabulary": "mini",
        "top_k": 410,
    },
    "one click, more classes than there are": {
        "points": [[3, 4]],
        "vocabulary": "pets",
        "top_k": 9,
    },
    "no region": {"boxes": [], "vocabulary": "pets", "return_masks": True},
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_answers_are_tritons_to_the_bit(
    case: str,
    url: str,
    guarded: str,
    certificates: Certificates,
    server: ServerRecord,
    picture: Path,
) -> None:
    question = make_question(picture, **QUESTIONS[case])
    with RegionClient(server.ports.grpc_url) as client:
        expected = client.ask(question)
    with RegionClient(url) as client:
        assert_identical(client.ask(question), expected)
    with RegionClient(guarded, token=TOKEN, ca_file=certificates.ca) as client:
        assert_identical(client.ask(question), expected)
    with RegionClient(server.ports.http_url) as client:  # Triton's own, by the same kind of URL
        assert_identical(client.ask(question), expected)

    async def ask() -> Answer:
        async with AsyncRegionClient(guarded, token=TOKEN, ca_file=certificates.ca) as client:
            return await client.ask(question)

    assert_identical(asyncio.run(ask()), expected)


def test_what_the_server_says_of_itself(url: str, server: ServerRecord) -> None:
    with RegionClient(server.ports.grpc_url) as client, RegionClient(url) as through:
        assert through.info() == client.info()


def test_an_image_is_encoded_once_and_sent_again_where_it_was_forgotten(
    url: str, picture: Path
) -> None:
    with RegionClient(url) as client:
        image = client.encode(picture)
        asked = make_question(image, BOX, "pets")
        first = client.ask(asked)
        assert first.cached
        forgotten = replace(image, handle=UNKNOWN_HANDLE)
        assert_identical(client.ask(replace(asked, image=forgotten)), first)
        with pytest.raises(RequestError) as raised:
            client.ask(replace(asked, image=RemoteImage(UNKNOWN_HANDLE)))
        assert raised.value.code == "IMAGE_UNKNOWN"


REFUSED: dict[str, tuple[Callable[[bytes], Question], str, str]] = {
    "outside": (
        lambda jpeg: make_question(jpeg, [[900, 900, 950, 950]], "pets"),
        "REGION_INVALID",
        "outside",
    ),
    "no number": (
        lambda jpeg: make_question(jpeg, [[np.nan, 0, 1, 1]], "pets"),
        "REGION_INVALID",
        "NaN",
    ),
    "unknown vocabulary": (
        lambda jpeg: make_question(jpeg, BOX, "birds"),
        "VOCABULARY_UNKNOWN",
        "birds",
    ),
    "no words": (lambda jpeg: make_question(jpeg, BOX, []), "VOCABULARY_INVALID", "empty"),
    "damaged": (lambda jpeg: make_question(jpeg[:300], BOX, "pets"), "IMAGE_INVALID", "image"),
    "many bytes": (
        lambda jpeg: make_question(jpeg + bytes(40 << 20), BOX, "pets"),
        "IMAGE_TOO_LARGE",
        "bytes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_keep_their_code(case: str, url: str, picture: Path) -> None:
    make, code, message = REFUSED[case]
    with RegionClient(url) as client, pytest.raises(RequestError, match=message) as raised:
        client.ask(make(picture.read_bytes()))
    assert raised.value.code == code


# ------------------------------------------------------------------ who is let in


def test_a_wrong_token_is_refused_at_once_and_shown_nowhere(
    guarded: str, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for token, shown in (("wrong-but-secret", "wants"), (None, "wants")):
        began = time.monotonic()
        client = RegionClient(guarded, token=token, ca_file=certificates.ca)
        with client, pytest.raises(RequestError, match=shown) as raised:
            client.info()
        assert raised.value.code == "UNAUTHORIZED" and time.monotonic() - began < 5
        told = [str(raised.value), repr(raised.value), repr(vars(client)), caplog.text]
        assert token is None or not any(token in text for text in told)
    held = Credentials("wrong-but-secret")
    assert "secret" not in repr(held) and "secret" not in str(held)
    with pytest.raises(InputError, match="printable ASCII") as refused:
        RegionClient(guarded, token="a secret\n")
    assert "secret" not in str(refused.value)


def test_a_certificate_of_a_stranger_is_refused_at_once(
    guarded: str, certificates: Certificates
) -> None:
    untrusted = r"certificate of .* is not one that can be"
    for ca_file in (None, certificates.other_ca):
        began = time.monotonic()
        client = RegionClient(guarded, token=TOKEN, ca_file=ca_file)
        with client, pytest.raises(InputError, match=untrusted):
            client.info()
        assert time.monotonic() - began < 5


def test_a_redirect_takes_the_token_nowhere() -> None:
    with Canned([http_answer(200, b"{}", "application/json")]) as other:
        elsewhere = http_answer(302, b"", Location=f"http://{other.host}/v1/info")
        told = f"redirects to 'http://{other.host}/v1/info'"
        with (
            Canned([elsewhere]) as first,
            RegionClient(f"http://{first.host}", token=TOKEN) as client,
            pytest.raises(RequestError, match=told),
        ):
            client.info()
    assert not other.accepted and TOKEN.encode() in first.requests[0]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("127.0.0.1:1", {"token": TOKEN}, "asks for no token"),
        ("127.0.0.1:1", {"ca_file": __file__}, "write grpcs://127.0.0.1:1"),
        ("http://127.0.0.1:1/a", {"ca_file": __file__}, "write https://127.0.0.1:1/a"),
        ("https://127.0.0.1", {"ca_file": "none.pem"}, "ca_file 'none.pem' cannot be read"),
        ("https://127.0.0.1", {"ca_file": __file__}, "holds no PEM certificates"),
        (
            "grpcs://127.0.0.1:1",
            {"client_cert_file": __file__, "client_key_file": __file__},
            "hold no PEM certificate and its key",
        ),
        ("https://127.0.0.1", {"client_key_file": __file__}, "go together"),
        ("https://user:hunter2@host", {}, "no name and password"),
        ("https://host/a b", {}, "no server's address"),
        ("grpcs://host/path:1", {}, "no server's address"),
        ("grpc://host", {}, "no server's address"),
        ("https://host:65536", {}, "no server's address"),
        ("https://host?x=1", {}, "no server's address"),
    ],
)
def test_addresses_and_credentials_that_cannot_be_used(
    given: str, options: dict[str, Any], message: str
) -> None:
    for kind in (RegionClient, AsyncRegionClient):
        with pytest.raises(InputError, match=message) as raised:
            kind(given, **options)
        assert "hunter2" not in str(raised.value)


def test_addresses() -> None:
    assert str(Address.parse("host:8001")) == "grpc://host:8001"
    assert str(Address.parse("https://host/regionspot/")) == "https://host:443/regionspot"
    assert str(Address.parse("http://[::1]")) == "http://[::1]:80"
    found = Address.parse("grpcs://[fe80::1]:8001")
    assert (found.name, found.port, found.is_tls, found.is_grpc) == ("fe80::1", 8001, True, True)


# ------------------------------------------------------------------ what proxies say


def told(code: str, message: str) -> bytes:
    error = {"code": code, "message": message, "request_id": "r-1"}
    return json.dumps({"error": error}).encode()


SAID = {
    "nginx cannot reach it": (http_answer(502, b"<html>Bad Gateway"), "UNAVAILABLE", "says 502"),
    "nginx lost patience": (http_answer(504, b"<html>"), "UNAVAILABLE", "says 504"),
    "nothing is up": (http_answer(503, b"no healthy upstream"), "UNAVAILABLE", "says 503"),
    "too large for nginx": (http_answer(413, b"<html>"), "IMAGE_TOO_LARGE", "takes no request of"),
    "a web firewall": (http_answer(403, b"<html>"), "UNAUTHORIZED", "lets nobody in"),
    "basic authentication": (http_answer(401, b"<html>"), "UNAUTHORIZED", "lets nobody in"),
    "a rate limit": (http_answer(429, b"slow down"), "OVERLOADED", "takes fewer requests"),
    "another web site": (http_answer(404, b"<html>"), "REQUEST_INVALID", "neither a gateway nor"),
    "a login page": (http_answer(200, b"<html>"), "INTERNAL", "text/html.*not JSON"),
    "an error page": (http_answer(500, b"<html>"), "INTERNAL", r"failed \(500\)"),
    "a lost end": (
        http_answer(200, b'{"model": "x"}', "application/json").replace(b": 14", b": 99"),
        "UNAVAILABLE",
        "cannot answer at the moment",
    ),
    "half an answer": (http_answer(200, b'{"mod', "application/json"), "UNAVAILABLE", "cut off"),
    "our refusal": (
        http_answer(429, told("OVERLOADED", "too many")),
        "OVERLOADED",
        "too many .request 'r-1'.",
    ),
    "our failure": (http_answer(504, told("TIMEOUT", "no answer")), "TIMEOUT", "request 'r-1'"),
    "a later release": (http_answer(429, told("QUOTA", "no words left")), "OVERLOADED", "no words"),
    "controls": (
        http_answer(400, told("IMAGE_INVALID", "\x1b[2J\u202e")),
        "IMAGE_INVALID",
        r"\\x1b\[2J\\u202e",
    ),
    "numbers": (http_answer(200, b"[1, 2]", "application/json"), "INTERNAL", "lacks"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_stands_between_is_understood(case: str) -> None:
    answer, code, message = SAID[case]
    with Canned([answer]) as proxy:
        client = RegionClient(f"http://{proxy.host}", 5, retry=False)
        with client, pytest.raises(ServingError, match=message) as raised:
            client.info()
        assert raised.value.code == code

        async def ask() -> None:
            async with AsyncRegionClient(f"http://{proxy.host}", 5, retry=False) as client:
                await client.info()

        with pytest.raises(ServingError, match=message):
            asyncio.run(ask())


def connection_to(proxy: Canned, timeout_s: float, retry: bool = True) -> HttpConnection:
    return HttpConnection(Address.parse(f"http://{proxy.host}"), timeout_s, retry, Credentials())


FINE = http_answer(200, b'{"fine": true}', "application/json")


@pytest.mark.parametrize("status", [429, 503])
def test_a_pause_that_the_server_asks_for_is_kept(status: int) -> None:
    busy = http_answer(status, told("OVERLOADED", "too many"), Retry_After="1")
    with Canned([busy, busy, FINE]) as proxy:
        began = time.monotonic()
        assert connection_to(proxy, 10).send(HttpRequest("/v1/info")) == {"fine": True}
        assert 2 <= time.monotonic() - began < 6 and len(proxy.requests) == 3


def test_a_pause_longer_than_the_time_left_is_told_at_once() -> None:
    soon = "Wed, 21 Oct 2099 07:28:00 GMT"
    for asked in ("60", soon):
        with Canned([http_answer(503, told("OVERLOADED", "too many"), Retry_After=asked)]) as proxy:
            began = time.monotonic()
            with pytest.raises(ServingError) as raised:
                connection_to(proxy, 5).send(HttpRequest("/v1/info"))
            assert time.monotonic() - began < 2 and len(proxy.requests) == 1
            assert raised.value.retry_after_s is not None and raised.value.retry_after_s >= 60
            copy = pickle.loads(pickle.dumps(raised.value))
            assert (copy.code, copy.retry_after_s, str(copy)) == (
                raised.value.code,
                raised.value.retry_after_s,
                str(raised.value),
            )


def test_what_can_be_mended_by_waiting_is_tried_again_and_nothing_else() -> None:
    gone = http_answer(502, b"<html>")
    cut = http_answer(200, b'{"fi', "application/json")
    with Canned([gone, cut, FINE]) as proxy:
        assert connection_to(proxy, 10).send(HttpRequest("/v1/info")) == {"fine": True}
    with Canned([http_answer(500, b"<html>"), FINE]) as proxy, pytest.raises(ServingError):
        connection_to(proxy, 10).send(HttpRequest("/v1/info"))
    assert len(proxy.requests) == 1


def test_an_answer_that_trickles_ends_with_the_time() -> None:
    class Slow(Canned):
        def _answer(self, connection: socket.socket) -> None:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
            while True:
                connection.sendall(b" ")
                time.sleep(0.2)

    with Slow([b""]) as proxy, pytest.raises(ServingError) as raised:
        connection_to(proxy, 1.5).send(HttpRequest("/v1/info"))
    assert raised.value.code == "TIMEOUT"


# ------------------------------------------------------------------ Triton over TLS, silent nodes


def test_triton_over_tls_with_a_certificate_of_the_clients(
    server: ServerRecord, certificates: Certificates, picture: Path
) -> None:
    question = make_question(picture, BOX, "pets")
    with RegionClient(server.ports.grpc_url) as client:
        expected = client.ask(question)
    context = server_context(certificates, mutual=True)
    own = certificates.client_files
    targets = {
        "grpcs": server.ports.grpc_url,
        "https": server.ports.http_url.removeprefix("http://"),
    }
    for protocol, target in targets.items():
        with Forwarder(target, context) as front:
            address = f"{protocol}://{front.host}"
            with RegionClient(address, 20, **own) as client:
                assert_identical(client.ask(question), expected)

            async def ask(address: str) -> Answer:
                async with AsyncRegionClient(address, 20, **own) as client:
                    return await client.ask(question)

            assert_identical(asyncio.run(ask(address)), expected)
            with (
                pipeline_from_triton(address, 20, **own) as pipeline,
                pickle.loads(pickle.dumps(pipeline)) as copy,
            ):
                assert copy.sam_fingerprint() == pipeline.sam_fingerprint()
            stranger = RegionClient(address, 20, ca_file=certificates.ca)
            with stranger, pytest.raises(ServingError, match="lets in only clients") as raised:
                stranger.info()
            assert raised.value.code == "UNAUTHORIZED"


def test_wrong_ends_of_tls_are_named_at_once(
    server: ServerRecord, certificates: Certificates, guarded: str
) -> None:
    with Forwarder(server.ports.grpc_url, server_context(certificates)) as front:
        for url, message in (
            (f"grpcs://{front.host}", "certificate of .* is not one that can be believed"),
            (front.host, f"speaks TLS: write grpcs://{front.host}"),
            (f"grpcs://{server.ports.grpc_url}", "does not speak TLS: write grpc://"),
            (guarded.partition("/below")[0].removeprefix("https://"), "speaks TLS"),
        ):
            began = time.monotonic()
            with RegionClient(url, 20) as client, pytest.raises(InputError, match=message):
                client.info()
            assert time.monotonic() - began < 8, url


def test_a_node_that_vanishes_costs_seconds(server: ServerRecord, picture: Path) -> None:
    """Its connection stays open and nothing comes: only pings tell."""
    question = make_question(picture, BOX, "pets")
    with Forwarder(server.ports.grpc_url) as front, RegionClient(front.host, 60) as client:
        expected = client.ask(question)
        front.silence()
        began = time.monotonic()
        assert_identical(client.ask(question), expected)
        assert time.monotonic() - began < 50


def test_every_http_connection_has_tcp_s_keepalive(url: str) -> None:
    """A host that vanishes answers no probe, which no server of this machine can play."""
    connection = HttpConnection(Address.parse(url), 5, True, Credentials())
    client = connection._open()
    with client.stream("GET", f"{url}/v1/info") as one, client.stream("GET", f"{url}/") as other:
        for response in (one, other):
            held = response.extensions["network_stream"].get_extra_info("socket")
            assert held.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            probes = [
                held.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            ]
            assert probes[0] + probes[1] * probes[2] <= 30
    connection.close()


# ------------------------------------------------------------------ threads, signals, graphs


def test_threads_share_a_client(url: str, dataset: Any, server: ServerRecord) -> None:
    questions = [
        make_question(dataset.image_path(record), BOX, "mini", top_k=3)
        for record in dataset.images[:8]
    ]
    with RegionClient(server.ports.grpc_url) as client:
        expected = [client.ask(question) for question in questions]
    with RegionClient(url) as client, ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(client.ask, questions * 3), expected * 3, strict=True):
            assert_identical(found, wanted)
        client.close()
        assert_identical(client.ask(questions[0]), expected[0])


@contextmanager
def alarm(error: Exception) -> Iterator[None]:
    """Raises an error in this thread soon."""

    def over(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", [TimeoutError("mine"), KeyError("mine")])
def test_what_a_signal_handler_raises_comes_out(url: str, picture: Path, error: Exception) -> None:
    """A TimeoutError, too, which an HTTP client would take for the socket's."""
    words = [f"toy number {index}" for index in range(8)]
    with RegionClient(url) as client:
        client.info()
        with alarm(error), pytest.raises(type(error)) as raised:
            client.ask(make_question(picture, BOX, [*words, str(error)]))
        assert raised.value is error
        assert client.recognize(picture, BOX, "pets").class_names == ("cat", "dog")


def test_a_task_that_is_cancelled_leaves_the_client_in_order(url: str, picture: Path) -> None:
    async def ask() -> Answer:
        async with AsyncRegionClient(url) as client:
            await client.info()
            task = asyncio.create_task(client.recognize(picture, BOX, "mini"))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await client.ask(make_question(picture, BOX, "pets"))

    assert len(asyncio.run(ask()).predictions) == 1


def test_graph_by_graph_needs_triton_itself(
    url: str, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="is a gateway, which answers whole questions only"):
        pipeline_from_triton(url)
    command = ["predict", str(picture), "--box", "5,5,90,90", "--vocabulary", "mini"]
    assert main([*command, "--runtime", "triton", "--url", url]) == 2
    assert "is a gateway, which answers whole questions only" in capsys.readouterr().err
