"""The gateway over HTTP: the model's answers, and everything that it must refuse, say or
survive.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regionspot.errors import InputError
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import CODES, Limits, RequestError, ServingError, version_of
from regionspot.serving.gateway import GatewaySettings, form, make_app
from regionspot.serving.gateway.admission import AdmissionQueue
from regionspot.serving.gateway.errors import STATUS
from regionspot.serving.gateway.form import Form, question_of
from regionspot.serving.gateway.records import STAGES
from regionspot.serving.messages import Answer, Question
from tests.serving.gateways import (
    BOX,
    GOOD,
    PICTURE,
    WORDS,
    Gated,
    Moody,
    Untouched,
    ask,
    assert_refused,
    closed_port,
    encoded,
    error_in,
    head,
    log_lines,
    metric,
    raw,
    running,
    until,
)

TOKEN = "correct-horse-battery-staple"
UNKNOWN_HANDLE = "0" * 64


@pytest.fixture(scope="module")
def gateway(server: Any) -> Iterator[httpx.Client]:
    with running(GatewaySettings(url=server.ports.grpc_url)) as client:
        yield client


# ------------------------------------------------------------------ answers


def test_boxes_are_named_as_the_client_names_them(
    gateway: httpx.Client, server: Any, picture: Path, boxes: list[list[float]]
) -> None:
    response = ask(gateway, picture.read_bytes(), boxes=boxes, words=WORDS, masks=True, top_k=2)
    assert response.status_code == 200, response.text
    with RegionClient(server.ports.grpc_url) as client:
        expected = client.recognize(picture, boxes, WORDS, return_masks=True, top_k=2).to_json(
            "toys.jpg"
        )
    content = response.json()
    names = ("image_handle", "cached", "model_version", "vocabulary_version")
    extra = {key: content.pop(key) for key in (*names, "request_id", "took_ms")}
    assert content == expected
    assert extra["vocabulary_version"] == version_of(WORDS) and extra["model_version"]
    assert extra["request_id"] == response.headers["x-request-id"]
    assert extra["took_ms"] > 0 and extra["image_handle"] and isinstance(extra["cached"], bool)


def test_points_with_labels_and_a_registered_vocabulary(
    gateway: httpx.Client, server: Any, picture: Path
) -> None:
    points, labels = [[[100, 100], [10, 10]], [[180, 60], [200, 200]]], [[1, 0], [1, 0]]
    response = ask(
        gateway,
        picture.read_bytes(),
        points=points,
        point_labels=labels,
        vocabulary="mini",
        masks=True,
    )
    with RegionClient(server.ports.grpc_url) as client:
        expected = client.recognize(
            picture, None, "mini", points=points, point_labels=labels, return_masks=True
        )
    assert response.json()["regions"] == expected.to_json("")["regions"]


def test_a_handle_stands_for_the_picture(
    gateway: httpx.Client, boxes: list[list[float]], picture: Path
) -> None:
    first = ask(gateway, picture.read_bytes(), boxes=boxes, words=WORDS).json()
    second = ask(gateway, image_handle=first["image_handle"], boxes=boxes, words=WORDS).json()
    assert second["cached"] is True
    assert (second["image_handle"], second["image"]["file_name"]) == (first["image_handle"], "")
    assert second["regions"] == first["regions"]


def test_no_region_is_fine(gateway: httpx.Client, picture: Path) -> None:
    assert (
        ask(gateway, picture.read_bytes(), boxes=[], points=[], words=WORDS).json()["regions"] == []
    )


def test_request_as_a_file_and_null_for_what_is_left_out(
    gateway: httpx.Client, picture: Path
) -> None:
    question = json.dumps(
        {"boxes": [[9, 9, 90, 90]], "points": None, "words": ["toy", "kítten"]}
    ).encode()
    files = {
        "request": ("question.json", question),
        "image": ("C:\\pictures\\toys.jpg", picture.read_bytes()),
    }
    response = gateway.post("/v1/recognize", files=files)
    assert response.status_code == 200, response.text
    assert response.json()["image"]["file_name"] == "toys.jpg"
    assert {name for name, _ in response.json()["regions"][0]["top"]} == {"toy", "kítten"}


def test_info(gateway: httpx.Client, server: Any) -> None:
    with RegionClient(server.ports.grpc_url) as client:
        info = client.info()
    content = gateway.get("/v1/info").json()
    assert (content["model"], content["runtime"], content["precision"]) == (
        info.model,
        info.runtime,
        info.precision,
    )
    counts = {one["name"]: one["words"] for one in content["vocabularies"]}
    assert counts == {name: len(words) for name, words in info.vocabularies.items()}
    assert content["model_version"] == info.version != ""
    assert content["limits"].items() >= info.limits.to_json().items()
    assert content["limits"]["max_body_bytes"] > info.limits.max_image_bytes


def test_health_and_readiness(gateway: httpx.Client) -> None:
    assert gateway.get("/healthz").json() == {"alive": True}
    assert gateway.get("/readyz?upstream=1").json() == {"ready": True, "upstream": "up"}
    assert gateway.get("/readyz").json() == {"ready": True, "upstream": "up"}


# ------------------------------------------------------------------ refusals

REFUSED: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("unknown key", {"boxs": BOX}, 400, "REQUEST_INVALID", "'boxs'"),
    ("no regions", {"boxes": None}, 400, "REQUEST_INVALID", "no region was asked for"),
    ("no words", {"words": None}, 400, "REQUEST_INVALID", '"words"'),
    ("words and a name", {"vocabulary": "mini"}, 400, "REQUEST_INVALID", "either"),
    ("picture and handle", {"image_handle": "abc"}, 400, "REQUEST_INVALID", "either"),
    ("NaN", {"boxes": [[float("nan"), 1, 2, 3]]}, 400, "REQUEST_INVALID", "NaN"),
    ("Infinity", {"boxes": [[0, 0, float("inf"), 3]]}, 400, "REQUEST_INVALID", "Infinity"),
    ("too large for float32", {"boxes": [[0, 0, 1e300, 3]]}, 422, "REGION_INVALID", "infinite"),
    (
        "a whole number of 400 digits",
        {"boxes": [[0, 0, 10**400, 3]]},
        400,
        "REQUEST_INVALID",
        "boxes",
    ),
    ("texts as numbers", {"boxes": [["1", "2", "3", "4"]]}, 400, "REQUEST_INVALID", "numbers only"),
    (
        "truth values as numbers",
        {"boxes": [[True, 0, 3, 4]]},
        400,
        "REQUEST_INVALID",
        "numbers only",
    ),
    ("three numbers", {"boxes": [[1, 2, 3]]}, 400, "REQUEST_INVALID", "x0, y0, x1, y1"),
    ("ragged", {"boxes": [[1, 2, 3, 4], [1, 2, 3]]}, 400, "REQUEST_INVALID", "boxes"),
    ("deep", {"points": [[[[1, 2]]]]}, 400, "REQUEST_INVALID", "points"),
    ("boxes as an object", {"boxes": {"a": 1}}, 400, "REQUEST_INVALID", "list"),
    ("labels without points", {"point_labels": [1]}, 400, "REQUEST_INVALID", "points"),
    (
        "other labels",
        {"points": [[1, 1]], "point_labels": [2]},
        400,
        "REQUEST_INVALID",
        "point labels must be 1",
    ),
    (
        "truth values as labels",
        {"points": [[1, 1]], "point_labels": [True]},
        400,
        "REQUEST_INVALID",
        "numbers only",
    ),
    (
        "labels for other clicks",
        {"points": [[1, 1]], "point_labels": [1, 1]},
        400,
        "REQUEST_INVALID",
        "each click",
    ),
    ("inverted box", {"boxes": [[20, 20, 1, 1]]}, 422, "REGION_INVALID", "box 0"),
    ("box outside", {"boxes": [[500, 500, 600, 600]]}, 422, "REGION_INVALID", "outside"),
    ("click outside", {"points": [[500, 1]]}, 422, "REGION_INVALID", "outside"),
    ("301 boxes", {"boxes": BOX * 301}, 422, "TOO_MANY_REGIONS", "300"),
    ("no word", {"words": []}, 422, "VOCABULARY_INVALID", "empty"),
    ("blank word", {"words": ["cat", " "]}, 422, "VOCABULARY_INVALID", "blank"),
    ("word twice", {"words": ["cat", "cat"]}, 422, "VOCABULARY_INVALID", "more than once"),
    ("long word", {"words": ["c" * 257]}, 422, "VOCABULARY_INVALID", "256"),
    ("half a surrogate pair", {"words": ["\ud83d"]}, 422, "VOCABULARY_INVALID", "Unicode"),
    ("2049 words", {"words": [str(n) for n in range(2049)]}, 422, "TOO_MANY_WORDS", "2048"),
    ("numbers as words", {"words": [1, 2]}, 400, "REQUEST_INVALID", "words"),
    (
        "unknown vocabulary",
        {"words": None, "vocabulary": "nope"},
        422,
        "VOCABULARY_UNKNOWN",
        "mini",
    ),
    ("top_k 0", {"top_k": 0}, 400, "REQUEST_INVALID", "top_k"),
    ("top_k 2.5", {"top_k": 2.5}, 400, "REQUEST_INVALID", "top_k"),
    ("masks 1", {"masks": 1}, 400, "REQUEST_INVALID", "masks"),
]


@pytest.mark.parametrize(
    ("change", "status", "code", "said"),
    [row[1:] for row in REFUSED],
    ids=[row[0] for row in REFUSED],
)
def test_refused_question(
    gateway: httpx.Client, change: dict[str, Any], status: int, code: str, said: str
) -> None:
    assert said in error_in(ask(gateway, PICTURE, **{**GOOD, **change}), status, code)


@pytest.mark.parametrize(
    "text", ["", "[", "[]", '"a"', "{}}", "[" * 100_000, '{"words": NaN}', "\x00"]
)
def test_refused_json(gateway: httpx.Client, text: str) -> None:
    response = gateway.post(
        "/v1/recognize", files={"request": (None, text), "image": ("a.png", PICTURE)}
    )
    assert "JSON" in error_in(response, 400, "REQUEST_INVALID")


def test_unknown_handle(gateway: httpx.Client) -> None:
    assert "send the picture" in error_in(
        ask(gateway, image_handle=UNKNOWN_HANDLE, **GOOD), 404, "IMAGE_UNKNOWN"
    )
    assert "image_handle" in error_in(
        ask(gateway, image_handle=["a"], **GOOD), 400, "REQUEST_INVALID"
    )
    assert "either" in error_in(ask(gateway, **GOOD), 400, "REQUEST_INVALID")


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "empty"),
        (b"GIF89a" + bytes(40), "JPEG, PNG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "JPEG, PNG or WebP"),
        (b"\xff\xd8\xff", "damaged"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(60), "damaged"),
        (b"\xff\xd8" + b"\xff\xe1\x00\x02" * 9000, "segments"),
        (PICTURE[:18], "damaged"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(20), "damaged"),
        (PICTURE[: len(PICTURE) // 2], ""),  # the server's to find out
    ],
)
def test_no_picture(gateway: httpx.Client, image: bytes, said: str) -> None:
    assert said in error_in(ask(gateway, image, **GOOD), 400, "IMAGE_INVALID")


def test_refused_forms(gateway: httpx.Client) -> None:
    url = "/v1/recognize"
    question = (None, json.dumps(GOOD))
    assert "multipart" in error_in(gateway.post(url, json=GOOD), 415, "REQUEST_INVALID")
    assert "multipart" in error_in(gateway.post(url), 415, "REQUEST_INVALID")
    broken = {"content-type": "multipart/form-data"}
    assert "form" in error_in(
        gateway.post(url, content=b"abc", headers=broken), 400, "REQUEST_INVALID"
    )
    broken = {"content-type": "multipart/form-data; boundary=x; charset=idna"}
    part = b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n\xff\xff..\r\n--x--\r\n'
    error_in(gateway.post(url, content=part, headers=broken), 400, "REQUEST_INVALID")
    error_in(
        gateway.post(url, content=part.replace(b"--x--", b"--y"), headers=broken),
        400,
        "REQUEST_INVALID",
    )
    assert '"request"' in error_in(
        gateway.post(url, files={"image": ("a", PICTURE)}), 400, "REQUEST_INVALID"
    )
    extra: Any = {"request": question, "picture": ("a", PICTURE)}
    assert "'picture'" in error_in(gateway.post(url, files=extra), 400, "REQUEST_INVALID")
    twice = [("request", question), ("request", question)]
    assert "twice" in error_in(gateway.post(url, files=twice), 400, "REQUEST_INVALID")
    many = [("request", question)] * 5
    assert "Too many" in error_in(gateway.post(url, files=many), 400, "REQUEST_INVALID")
    as_text = {"request": question, "image": (None, "abc")}
    assert "must be a file" in error_in(gateway.post(url, files=as_text), 400, "REQUEST_INVALID")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *[
            ("GET", path, 404)
            for path in ("/nope", "/v1", "/v1/recognize/", "/static/", "/static/nope.js")
        ],
        *[
            ("GET", path, 404)
            for path in (
                "/static/..%2f..%2fcontract.py",
                "/static/%00",
                "/static/../gateway/app.py",
            )
        ],
        ("GET", "/v1/recognize", 405),
        ("DELETE", "/v1/info", 405),
        ("POST", "/", 405),
    ],
)
def test_no_such_address(gateway: httpx.Client, method: str, path: str, status: int) -> None:
    error_in(gateway.request(method, path), status, "REQUEST_INVALID")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(form.KEYS), JSON | st.lists(st.lists(st.floats(), min_size=2, max_size=4))
    )
)
def test_any_json_is_a_question_or_refused(content: dict[str, Any]) -> None:
    with suppress(RequestError):
        question = question_of(Form(json.dumps(content), PICTURE, "a.png"), Limits())
        (read,) = Question.from_tensors(question.to_tensors())
        assert (read.vocabulary, read.top_k, read.return_masks) == (
            question.vocabulary,
            question.top_k,
            question.return_masks,
        )
        assert read.num_regions == question.num_regions


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"boxes": [[0, 0, 1e300, 3]]}, "REGION_INVALID"),
        ({"points": [[1, -1e300]]}, "REGION_INVALID"),
        ({"words": []}, "VOCABULARY_INVALID"),
        ({"words": None, "vocabulary": ""}, "VOCABULARY_UNKNOWN"),
        ({"words": None, "vocabulary": "v" * 257}, "VOCABULARY_UNKNOWN"),
    ],
)
def test_refused_without_asking_the_server(change: dict[str, Any], code: str) -> None:
    form = Form(json.dumps({**GOOD, **change}), PICTURE, "a.png")
    with pytest.raises(RequestError) as refused:
        question_of(form, Limits())
    assert refused.value.code == code


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(CODES)


# ------------------------------------------------------------------ sizes


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


BOMBS = {
    "png": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    + bytes(64),
    "jpeg": b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03" + bytes(64),
    "webp": b"RIFF\x00\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00"
    + bytes(4)
    + b"\xff\xff\x00\xff\xff\x00"
    + bytes(64),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_goes_no_further(kind: str) -> None:
    with running(GatewaySettings("unused:1"), Untouched) as client:
        assert "pixels" in error_in(ask(client, BOMBS[kind], **GOOD), 413, "IMAGE_TOO_LARGE")


def test_a_jpeg_of_many_scans_goes_no_further() -> None:
    """514 kB of them stopped the server for 105 s."""
    scans = encoded(file_format="JPEG", progressive=True)
    last, end = scans.rindex(b"\xff\xda"), scans.rindex(b"\xff\xd9")
    bomb = scans[:last] + scans[last:end] * 3000 + scans[end:]
    with running(GatewaySettings("unused:1"), Untouched) as client:
        assert "scans" in error_in(ask(client, bomb, **GOOD), 413, "IMAGE_TOO_LARGE")


def test_a_declared_length_is_refused_before_the_body(gateway: httpx.Client) -> None:
    with raw(gateway) as connection:
        connection.sendall(
            head(["Content-Length: 999999999", "Content-Type: multipart/form-data; boundary=x"])
        )
        assert_refused(connection, b" 413 ", b"IMAGE_TOO_LARGE")


def test_bytes_are_counted_as_they_come(server: Any) -> None:
    """Without a length, an endless body is cut off, and its sender is still told why."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(400):
            sent += 50_000
            yield bytes(50_000)

    with running(GatewaySettings(server.ports.grpc_url, max_body_bytes=200_000)) as client:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        response = client.post("/v1/recognize", content=endless(), headers=headers)
        assert "200000" in error_in(response, 413, "IMAGE_TOO_LARGE")
        assert client.get("/healthz").status_code == 200


def test_a_length_that_is_too_little(gateway: httpx.Client) -> None:
    """What goes beyond it is no part of the request."""
    with raw(gateway) as connection:
        lines = ["Content-Length: 10", "Content-Type: multipart/form-data; boundary=x"]
        connection.sendall(head(lines) + b"--x\r\nConte" + bytes(100_000))
        assert_refused(connection, b" 400 ", b"REQUEST_INVALID")
    assert gateway.get("/healthz").status_code == 200


@pytest.mark.parametrize("file_name", [None, "question.json"])
def test_a_large_question(gateway: httpx.Client, file_name: str | None) -> None:
    response = gateway.post("/v1/recognize", files={"request": (file_name, "x" * (5 << 20))})
    error_in(response, 400, "REQUEST_INVALID")
    assert "no JSON" not in response.text  # it is not read


def test_endless_part_headers(gateway: httpx.Client) -> None:
    body = b"--x\r\nContent-Disposition: " + b"a" * (8 << 20)
    began = time.monotonic()
    headers = {"content-type": "multipart/form-data; boundary=x"}
    error_in(gateway.post("/v1/recognize", content=body, headers=headers), 400, "REQUEST_INVALID")
    assert time.monotonic() - began < 5


# ------------------------------------------------------------------ many callers, slow and gone
# ones


def test_who_comes_too_many_is_told_at_once() -> None:
    fake = Gated()
    with (
        running(
            GatewaySettings("unused:1", concurrency=1, max_waiting=2), lambda *_: fake
        ) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        patient = [pool.submit(ask, client, PICTURE, **GOOD) for _ in range(3)]
        until(lambda: (metric(client, "in_flight"), metric(client, "waiting")) == (1, 2))
        began = time.monotonic()
        refused = ask(client, PICTURE, **GOOD)
        assert time.monotonic() - began < 1
        assert "later" in error_in(refused, 503, "OVERLOADED")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        with raw(client) as connection:  # before its body has come
            connection.sendall(
                head(["Content-Length: 30000", "Content-Type: multipart/form-data; boundary=x"])
            )
            assert_refused(connection, b" 503 ", b"OVERLOADED")
        assert fake.asked == 1  # the others wait
        fake.gate.set()
        assert [one.result().status_code for one in patient] == [200, 200, 200]
        assert fake.asked == 3
        assert (
            metric(client, "shed_total"),
            metric(client, "in_flight"),
            metric(client, "waiting"),
        ) == (2, 0, 0)


def test_a_real_server_under_more_than_it_may_take(
    server: Any, picture: Path, boxes: list[list[float]]
) -> None:
    with (
        running(GatewaySettings(server.ports.grpc_url, concurrency=1, max_waiting=1)) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        image = picture.read_bytes()
        expected = ask(client, image, boxes=boxes, words=WORDS).json()["regions"]
        responses = list(
            pool.map(lambda _: ask(client, image, boxes=boxes, words=WORDS), range(48))
        )
        answered = [response for response in responses if response.status_code == 200]
        assert answered and all(response.json()["regions"] == expected for response in answered)
        for response in responses:
            if response not in answered:
                error_in(response, 503, "OVERLOADED")
        assert (metric(client, "in_flight"), metric(client, "waiting")) == (0, 0)


@pytest.mark.parametrize("waiting", [False, True], ids=["in flight", "waiting"])
def test_a_caller_who_goes_gives_his_turn_back(
    waiting: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = Gated()
    chosen = GatewaySettings("unused:1", concurrency=1, max_waiting=1)
    with running(chosen, lambda *_: fake) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, PICTURE, **GOOD) if waiting else None
        until(lambda: fake.asked == int(waiting))
        with pytest.raises(httpx.ReadTimeout):
            body: Any = {"request": (None, json.dumps(GOOD)), "image": ("a.png", PICTURE)}
            client.post("/v1/recognize", files=body, timeout=0.3, headers={"X-Request-ID": "gone"})
        until(lambda: metric(client, "in_flight") + metric(client, "waiting") == int(waiting))
        assert (fake.asked, fake.cancelled) == (1, int(not waiting))
        fake.gate.set()
        assert first is None or first.result().status_code == 200
        assert ask(client, PICTURE, **GOOD).status_code == 200
    (line,) = [line for line in log_lines(capfd) if line["request_id"] == "gone"]
    assert (line["status"], line["code"]) == (499, "CLIENT_GONE")


def test_no_answer_in_time() -> None:
    fake = Gated()
    with running(GatewaySettings("unused:1", timeout_s=0.3), lambda *_: fake) as client:
        assert "0.3 s" in error_in(ask(client, PICTURE, **GOOD), 504, "TIMEOUT")
        until(lambda: fake.cancelled == 1)
        assert metric(client, "in_flight") == 0


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regionspot.serving.gateway.app.UPLOAD_TIMEOUT_S", 0.2)
    with running(GatewaySettings("unused:1"), Untouched) as client, raw(client) as connection:
        connection.sendall(
            head(["Content-Length: 30000", "Content-Type: multipart/form-data; boundary=x"])
            + b"--x\r\n"
        )
        assert_refused(connection, b" 408 ", b"TIMEOUT")
        until(lambda: metric(client, "waiting") == 0)


def test_turns_estimate_when_to_come_back() -> None:
    async def used() -> AdmissionQueue:
        turns = AdmissionQueue(2, 8)
        for _ in range(3):
            with turns.place():
                async with turns.turn():
                    await asyncio.sleep(0.01)
        return turns

    turns = asyncio.run(used())
    assert turns.retry_after_s() == 1
    turns.admitted = 400
    assert turns.retry_after_s() == 60


# ------------------------------------------------------------------ a server that is gone, and one
# that fails


def test_a_gateway_without_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regionspot.serving.gateway.fleet.WATCH_S", 60.0)
    with running(GatewaySettings(f"127.0.0.1:{closed_port()}")) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/").status_code == 200
        for response in (
            ask(client, PICTURE, **GOOD),
            client.get("/v1/info"),
            client.get("/readyz?upstream=1"),
        ):
            assert "cannot be reached" in error_in(response, 503, "UNAVAILABLE")
            assert int(response.headers["retry-after"]) >= 1
        # the gateway answers, and callers had rather read that than find nobody
        assert client.get("/readyz").json() == {"ready": True, "upstream": "down"}
        assert metric(client, "upstream_up") == 0
        began = time.monotonic()
        error_in(client.get("/v1/info"), 503, "UNAVAILABLE")
        assert time.monotonic() - began < 2  # at once, since it is known to be gone


def test_the_logging_of_the_process_stays_as_it_was(tmp_path: Path) -> None:
    """`logging.config` would close the handlers of whoever runs the gateway."""

    class Handler(logging.FileHandler):
        closed = False

        def close(self) -> None:
            self.closed = True
            super().close()

    handler = Handler(tmp_path / "log", delay=True)
    with running(GatewaySettings("unused:1"), Untouched) as client:
        assert client.get("/healthz").status_code == 200
        assert not handler.closed
    assert not handler.closed
    handler.close()


def test_failures_are_told_without_the_inside(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regionspot.serving.gateway.fleet.RIDE_S", 0.1)
    fake = Moody()
    with running(GatewaySettings("unused:1"), lambda *_: fake) as client:
        for code, status in {
            "UNAVAILABLE": 503,
            "TIMEOUT": 504,
            "INTERNAL": 500,
            "OVERLOADED": 503,
        }.items():
            fake.failure = ServingError(code, "127.0.0.1:8001 says: /secret/path.py fell over")
            error_in(ask(client, PICTURE, headers={"X-Request-ID": code}, **GOOD), status, code)
        fake.failure = RuntimeError("/secret/path.py")
        error_in(
            ask(client, PICTURE, headers={"X-Request-ID": "unexpected"}, **GOOD), 500, "INTERNAL"
        )
        fake.failure = None
        assert ask(client, PICTURE, **GOOD).status_code == 200
    details = {line["request_id"]: line.get("detail", "") for line in log_lines(capfd)}
    assert "/secret/path.py" in details["INTERNAL"] and "/secret/path.py" in details["UNAVAILABLE"]
    assert "Traceback" in details["unexpected"] and "RuntimeError" in details["unexpected"]


def test_what_the_server_runs_is_asked_again_after_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("regionspot.serving.gateway.fleet.RIDE_S", 0.1)
    fake = Moody()
    with running(GatewaySettings("unused:1"), lambda *_: fake) as client:
        for _ in range(3):
            ask(client, PICTURE, **GOOD)
        assert fake.infos == 1
        fake.failure = ServingError("UNAVAILABLE", "gone")
        ask(client, PICTURE, **GOOD)
        fake.failure = None
        ask(client, PICTURE, **GOOD)
        assert fake.infos == 2


UPSTREAM = "/readyz?upstream=1"


def test_health_of_the_server_is_a_real_answer_and_kept_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("regionspot.serving.gateway.upstream.VERDICT_AGE_S", 0.5)
    fake = Moody()
    with running(GatewaySettings("unused:1"), lambda *_: fake) as client:
        error_in(client.get(UPSTREAM), 503, "UNAVAILABLE")  # it answers, but without the region
        asked = fake.asked
        assert asked == 1
        error_in(client.get(UPSTREAM), 503, "UNAVAILABLE")
        assert fake.asked == asked
        time.sleep(0.6)
        error_in(client.get(UPSTREAM), 503, "UNAVAILABLE")
        assert fake.asked == asked + 1


class Busy(Moody):
    """A server with a long queue: it answers, but not the small question in time."""

    async def ask(self, *arguments: Any, **options: Any) -> Answer:
        if options["request_id"] == "canary":
            self.asked += 1
            await asyncio.sleep(60)
        return await super().ask(*arguments, **options)


def test_a_busy_server_is_up_for_as_long_as_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 legal callers made the small question late, and every gateway unready."""
    upstream = "regionspot.serving.gateway.upstream."
    monkeypatch.setattr(f"{upstream}CANARY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(f"{upstream}VERDICT_AGE_S", 0.2)
    fake = Busy()
    with running(GatewaySettings("unused:1"), lambda *_: fake) as client:
        ask(client, PICTURE, **GOOD)
        asked = fake.asked
        assert client.get(UPSTREAM).status_code == 200
        assert fake.asked == asked  # an answer of just now is as good
        time.sleep(0.3)
        assert client.get(UPSTREAM).status_code == 200  # the small question was late
        assert fake.asked == asked + 1
        fake.failure = ServingError("TIMEOUT", "late")
        error_in(ask(client, PICTURE, **GOOD), 504, "TIMEOUT")
        assert client.get("/readyz").json()["upstream"] == "up"
        monkeypatch.setattr(f"{upstream}PROGRESS_S", 0.1)
        time.sleep(0.2)
        error_in(client.get(UPSTREAM), 503, "UNAVAILABLE")  # nobody was answered for too long
        assert client.get("/readyz").json() == {"ready": True, "upstream": "down"}


def test_a_server_that_has_too_much_to_do_is_told_of_at_once() -> None:
    fake = Moody()
    fake.failure = ServingError("OVERLOADED", "queue full")
    with running(GatewaySettings("unused:1"), lambda *_: fake) as client:
        began = time.monotonic()
        refused = ask(client, PICTURE, **GOOD)
        assert time.monotonic() - began < 5
        error_in(refused, 503, "OVERLOADED")
        assert int(refused.headers["retry-after"]) >= 1


def test_a_restart_of_the_server_is_not_noticed() -> None:
    fake = Moody()
    fake.failure = ServingError("UNAVAILABLE", "restarting")
    with (
        running(GatewaySettings("unused:1"), lambda *_: fake) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(ask, client, PICTURE, **GOOD)
        time.sleep(0.5)
        assert not answer.done()
        fake.failure = None
        assert answer.result().status_code == 200
        assert client.get("/readyz").json()["upstream"] == "up"


# ------------------------------------------------------------------ who may, and what is written
# down


def test_token(server: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with running(GatewaySettings(server.ports.grpc_url, token=TOKEN)) as client:
        for path in ("/", "/static/app.js", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        wrong: list[Any] = [
            {},
            {"Authorization": "Bearer nope"},
            {"Authorization": TOKEN},
            {"Authorization": f"Basic {TOKEN}"},
        ]
        for headers in [
            *wrong,
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": "Bearer ä".encode("latin-1")},
        ]:
            for response in (
                client.get("/v1/info", headers=headers),
                client.get("/metrics", headers=headers),
                client.post("/v1/recognize", headers=headers),
            ):
                assert "Authorization" in error_in(response, 401, "UNAUTHORIZED")
                assert response.headers["www-authenticate"].startswith("Bearer")
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/info", headers=right).status_code == 200
        assert client.get("/metrics", headers=right).status_code == 200
        assert ask(client, PICTURE, headers=right, **GOOD).status_code == 200
    assert TOKEN not in capfd.readouterr().err
    assert TOKEN not in repr(GatewaySettings("a:1", token=TOKEN))


def test_one_line_for_each_request(
    gateway: httpx.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    good = ask(gateway, PICTURE, headers={"X-Request-ID": "abc-1.2:3_4"}, **GOOD)
    assert good.json()["request_id"] == good.headers["x-request-id"] == "abc-1.2:3_4"
    bad = ask(gateway, PICTURE, headers={"X-Request-ID": "bad"}, **{**GOOD, "boxes": BOX * 301})
    assert bad.status_code == 422
    for path in ("/healthz", "/readyz", "/metrics", "/", "/static/app.js", "/openapi.json"):
        assert gateway.get(path).status_code == 200  # probes and files: not worth a line
    gateway.get("/nowhere?token=secret")
    lines: list[dict[str, Any]] = []
    while len(lines) < 3:  # a line comes after its answer
        lines += log_lines(capfd)
    first, second, third = lines
    assert {
        key: first[key]
        for key in (
            *("request_id", "client", "caller", "method", "path", "status", "code"),
            *("regions", "words", "image_bytes"),
        )
    } == {
        "request_id": "abc-1.2:3_4",
        "client": "127.0.0.1",
        "caller": "anonymous",
        "words": 2,
        "method": "POST",
        "path": "/v1/recognize",
        "status": 200,
        "code": "OK",
        "regions": 1,
        "image_bytes": len(PICTURE),
    }
    assert first["took_ms"] > 0 and abs(first["time"] - time.time()) < 60
    stages = [first[f"{stage}_ms"] for stage in STAGES]
    assert first["model_ms"] > 0 and sum(stages) <= first["took_ms"] + 1
    assert (second["request_id"], second["status"], second["code"]) == (
        "bad",
        422,
        "TOO_MANY_REGIONS",
    )
    assert "room_ms" in second and "model_ms" not in second  # it came as far as this
    assert third["path"] == "/nowhere" and "secret" not in json.dumps(third)


@pytest.mark.parametrize("given", ["", "a" * 65, "a b", "ä", "a\tb", '{"x":1}', "../../etc"])
def test_odd_request_ids_are_replaced(gateway: httpx.Client, given: str) -> None:
    response = gateway.get("/healthz", headers={b"X-Request-ID": given.encode("latin-1")})
    assert response.headers["x-request-id"] != given
    assert len(response.headers["x-request-id"]) == 32


def test_metrics_count_by_route_and_code(server: Any) -> None:
    with (
        running(GatewaySettings(server.ports.grpc_url)) as client,
        running(GatewaySettings(server.ports.grpc_url)) as other,
    ):
        ask(client, PICTURE, **GOOD)
        ask(client, PICTURE, **{**GOOD, "boxes": BOX * 301})
        for number in range(5):
            client.get(f"/strange/{number}")
        text = client.get("/metrics").text
        assert 'regionspot_gateway_requests_total{code="OK",route="/v1/recognize"} 1.0' in text
        assert (
            'regionspot_gateway_requests_total{code="TOO_MANY_REGIONS",route="/v1/recognize"} 1.0'
            in text
        )
        assert 'regionspot_gateway_requests_total{code="REQUEST_INVALID",route="other"} 5.0' in text
        assert 'regionspot_gateway_latency_seconds_count{route="/v1/recognize"} 2.0' in text
        assert "/strange" not in text
        assert 'regionspot_gateway_caller_requests_total{caller="anonymous",code="OK"} 1.0' in text
        assert metric(client, 'stage_seconds_total{stage="model"}') > 0
        assert (metric(client, "upstream_up"), metric(client, "connections")) == (1, 1)
        assert metric(other, 'requests_total{code="OK",route="/v1/recognize"}') == 0


def test_the_page_and_its_files(gateway: httpx.Client) -> None:
    page = gateway.get("/")
    assert page.headers["content-type"].startswith("text/html") and "<title>RegionSpot" in page.text
    policy = page.headers["content-security-policy"]
    assert (
        "unsafe" not in policy
        and "default-src 'none'" in policy
        and "frame-ancestors 'none'" in policy
    )
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    for name, kind in {
        "app.js": "text/javascript",
        "style.css": "text/css",
        "favicon.svg": "image/svg+xml",
    }.items():
        response = gateway.get(f"/static/{name}")
        assert response.headers["content-type"].startswith(kind)
        again = gateway.get(f"/static/{name}", headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert "http" not in page.text.replace("http-equiv", "")  # nothing from elsewhere


@pytest.mark.parametrize(
    "change",
    [
        *({"concurrency": 0}, {"max_waiting": -1}, {"timeout_s": 0}, {"timeout_s": float("nan")}),
        *({"token": ""}, {"token": "a b"}, {"token": "ä"}, {"max_body_bytes": 0}),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        GatewaySettings("localhost:8001", **change)


def test_an_address_that_is_none() -> None:
    with pytest.raises(InputError, match="no server's address"):
        make_app(GatewaySettings("localhost"))


def test_told_to_stop_it_finishes_what_it_has_begun(server: Any) -> None:
    """As a process of its own, with a question that takes a while: many words that the server has
    not met.
    """
    port = closed_port()
    code = (
        "from regionspot.serving.gateway import *; "
        f"run(GatewaySettings({server.ports.grpc_url!r}), port={port})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            until_answers(client)
            words = [f"thing {os.getpid()} {number}" for number in range(60)]
            answer = pool.submit(ask, client, PICTURE, boxes=BOX, words=words)
            time.sleep(0.15)
            process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert all(line.startswith('{"time"') for line in errors.splitlines()), errors


def until_answers(client: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while True:
        with suppress(httpx.ConnectError):
            client.get("/healthz")
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)
