"""Who may ask a gateway, from where and how much: tokens, quotas, fair shares, handles, sites and
proxies.
"""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.datastructures import Headers

from regionspot.errors import InputError
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import RequestError
from regionspot.serving.gateway import GatewaySettings
from regionspot.serving.gateway import tokens as tokens_module
from regionspot.serving.gateway.admission import FairPool
from regionspot.serving.gateway.errors import HttpError
from regionspot.serving.gateway.handles import HandleSeal
from regionspot.serving.gateway.sites import Proxies
from regionspot.serving.gateway.tokens import read_tokens
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
    encoded,
    error_in,
    head,
    log_lines,
    metric,
    raw,
    running,
    until,
)

ALICE, ALICE_NEW, BOB = "alice-alice-alice", "alice-new-alice-new", "bob-bob-bob-bob-bob"
OPERATOR = "operator-operator"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def tokens_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def two_callers(tmp_path: Path, alice: str = "", bob: str = "") -> Path:
    return tokens_file(
        tmp_path / "tokens.toml",
        f'[alice]\ntoken = "{ALICE}"\n{alice}\n'
        f'[bob]\ntoken_sha256 = "{sha256(BOB.encode()).hexdigest()}"\n{bob}\n',
    )


def answering() -> Moody:
    return Moody()


# ------------------------------------------------------------------ tokens


def test_named_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = two_callers(tmp_path, alice="metrics = true")
    with running(GatewaySettings("unused:1", tokens_file=path), lambda *_: answering()) as client:
        for token, status in ((ALICE, 200), (BOB, 200), ("nobody-nobody-nobody", 401)):
            assert ask(client, PICTURE, headers=bearer(token), **GOOD).status_code == status
            assert client.get("/v1/info", headers=bearer(token)).status_code == status
        error_in(client.get("/v1/info"), 401, "UNAUTHORIZED")
        error_in(client.get("/metrics"), 401, "UNAUTHORIZED")
        error_in(client.get("/metrics", headers=bearer(BOB)), 403, "FORBIDDEN")
        text = client.get("/metrics", headers=bearer(ALICE)).text
        for caller, code in (("alice", "OK"), ("bob", "OK"), ("-", "UNAUTHORIZED")):
            assert (
                f'regionspot_gateway_caller_requests_total{{caller="{caller}",code="{code}"}} 1.0'
                in text
            )
    output = capfd.readouterr().err
    assert ALICE not in output and BOB not in output
    assert '"caller": "alice"' in output and '"caller": "bob"' in output


def test_metrics_have_a_token_of_their_own(tmp_path: Path) -> None:
    path = tokens_file(tmp_path / "metrics", OPERATOR)
    only = tokens_file(tmp_path / "only", ALICE)
    for chosen in (
        GatewaySettings("unused:1", metrics_token_file=path, token_file=only),
        GatewaySettings("unused:1", metrics_token_file=path, token=ALICE),
        GatewaySettings("unused:1", metrics_token_file=path, tokens_file=two_callers(tmp_path)),
        GatewaySettings("unused:1", metrics_token_file=path),
    ):
        with running(chosen, lambda *_: answering()) as client:
            assert client.get("/metrics", headers=bearer(OPERATOR)).status_code == 200
            error_in(client.get("/v1/info", headers=bearer(OPERATOR)), 403, "FORBIDDEN")
            assert client.get("/v1/info", headers=bearer(ALICE)).status_code == 200
            refused = client.get("/metrics", headers=bearer(ALICE))
            if chosen.anonymous:
                error_in(refused, 401, "UNAUTHORIZED")
            else:
                error_in(refused, 403, "FORBIDDEN")
            error_in(client.get("/metrics"), 401, "UNAUTHORIZED")


def test_tokens_change_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokens_module, "POLL_S", 0.0)
    path = tokens_file(tmp_path / "tokens.toml", f'[alice]\ntoken = "{ALICE}"\n')

    def statuses(client: httpx.Client) -> list[int]:
        return [
            client.get("/v1/info", headers=bearer(token)).status_code
            for token in (ALICE, ALICE_NEW)
        ]

    def replace(text: str) -> None:
        tokens_file(tmp_path / "next", text)
        os.replace(tmp_path / "next", path)

    with running(GatewaySettings("unused:1", tokens_file=path), lambda *_: answering()) as client:
        assert statuses(client) == [200, 401]
        replace(f'[alice]\ntoken = ["{ALICE}", "{ALICE_NEW}"]\n')
        assert statuses(client) == [200, 200]
        replace("[alice\n")
        assert statuses(client) == [200, 200]  # a slip of the hand locks nobody out
        replace(f'[alice]\ntoken = "{ALICE_NEW}"\n')
        assert statuses(client) == [401, 200]
        path.unlink()
        assert statuses(client) == [401, 200]
    said = capfd.readouterr().err
    assert "is kept" in said and "was read again" in said
    assert ALICE not in said


def test_the_only_token_changes_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "POLL_S", 0.0)
    path = tokens_file(tmp_path / "token", f"{ALICE}\nof July\n")
    with running(GatewaySettings("unused:1", token_file=path), lambda *_: answering()) as client:
        assert client.get("/v1/info", headers=bearer(ALICE)).status_code == 200
        assert client.get("/metrics", headers=bearer(ALICE)).status_code == 200
        tokens_file(path, f"{ALICE_NEW}\n")
        assert client.get("/v1/info", headers=bearer(ALICE)).status_code == 401
        assert client.get("/v1/info", headers=bearer(ALICE_NEW)).status_code == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no token"),
        ("[alice", "cannot be read"),
        ("[alice]\nrate = 5", "no token"),
        ('alice = "alice-alice-alice"', "must be a table"),
        ('[alice]\ntoken = "short"', "at least 16"),
        ('[alice]\ntoken = "with a space inside"', "at least 16"),
        ("[alice]\ntoken = 5", "a text, or a list"),
        ('[alice]\ntoken_sha256 = "0123456789abcdef"', "64 hexadecimal"),
        ('[alice]\ntoken = "alice-alice-alice"\nrates = 1', "'rates'"),
        ('[alice]\ntoken = "alice-alice-alice"\nrate = 0', "rate must be"),
        ('[alice]\ntoken = "alice-alice-alice"\nrate = inf', "rate must be"),
        ('[alice]\ntoken = "alice-alice-alice"\nconcurrency = 1.5', "concurrency must be"),
        ('[alice]\ntoken = "alice-alice-alice"\nburst = true', "burst must be"),
        ('[alice]\ntoken = "alice-alice-alice"\nmetrics = 1', "metrics must be"),
        ('["a b"]\ntoken = "alice-alice-alice"', "another name"),
        ('[anonymous]\ntoken = "alice-alice-alice"', "another name"),
        ('[a]\ntoken = "alice-alice-alice"\n[b]\ntoken = "alice-alice-alice"', "twice"),
        ('handle_secret = "short"\n[a]\ntoken = "alice-alice-alice"', "handle_secret"),
    ],
)
def test_files_of_tokens_that_cannot_be(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        read_tokens(tokens_file(tmp_path / "tokens.toml", text))
    assert ALICE not in str(refused.value)


def test_kinds_of_tokens_exclude_each_other(tmp_path: Path) -> None:
    for other in ({"token": ALICE}, {"token_file": tmp_path / "a"}):
        with pytest.raises(InputError, match="exclude each other"):
            GatewaySettings("unused:1", tokens_file=tmp_path / "b", **other)


# ------------------------------------------------------------------ quotas


def test_requests_have_a_rate(tmp_path: Path) -> None:
    path = two_callers(tmp_path, alice="rate = 0.01\nburst = 3", bob="rate = 4\nburst = 1")
    with running(GatewaySettings("unused:1", tokens_file=path), lambda *_: answering()) as client:
        answers = [ask(client, PICTURE, headers=bearer(ALICE), **GOOD) for _ in range(4)]
        assert [answer.status_code for answer in answers[:3]] == [200] * 3
        assert "0.01 requests a second" in error_in(answers[3], 429, "QUOTA_EXCEEDED")
        assert 1 < int(answers[3].headers["retry-after"]) <= 101
        for _ in range(3):
            assert ask(client, PICTURE, headers=bearer(BOB), **GOOD).status_code == 200
            time.sleep(0.3)


def test_new_words_have_a_rate(tmp_path: Path) -> None:
    path = two_callers(tmp_path, alice="new_words_per_minute = 10")

    def statuses(client: httpx.Client, *counts: int, token: str = ALICE) -> list[int]:
        return [
            ask(
                client,
                PICTURE,
                headers=bearer(token),
                boxes=BOX,
                words=[f"{count} {number}" for number in range(count)],
            ).status_code
            for count in counts
        ]

    with running(GatewaySettings("unused:1", tokens_file=path), lambda *_: answering()) as client:
        assert statuses(client, 7, 7, 7) == [200] * 3  # they are new but once
        refused = ask(client, PICTURE, headers=bearer(ALICE), boxes=BOX, words=[*"abcdefg", "7 0"])
        assert "10 new class names" in error_in(refused, 429, "QUOTA_EXCEEDED")
        assert 20 <= int(refused.headers["retry-after"]) <= 26
        assert statuses(client, 3) == [200]
        assert statuses(client, 11) == [422]  # not in any minute
        assert statuses(client, 50, token=BOB) == [200]


def test_words_that_were_not_answered_are_still_new(tmp_path: Path) -> None:
    path = two_callers(tmp_path, alice="new_words_per_minute = 5")
    fake = answering()
    with running(GatewaySettings("unused:1", tokens_file=path), lambda *_: fake) as client:
        fake.failure = RuntimeError("failed")
        assert ask(client, PICTURE, headers=bearer(ALICE), **GOOD).status_code == 500
        fake.failure = None
        answers = [ask(client, PICTURE, headers=bearer(ALICE), **GOOD) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        refused = ask(client, PICTURE, headers=bearer(ALICE), boxes=BOX, words=["x", "y"])
        error_in(refused, 429, "QUOTA_EXCEEDED")  # 2 + 2 + 2


# ------------------------------------------------------------------ fair shares


def test_a_slow_caller_leaves_turns_and_places_to_others(tmp_path: Path) -> None:
    path = two_callers(tmp_path)
    fake = Gated()
    chosen = GatewaySettings("unused:1", tokens_file=path, concurrency=3, max_waiting=5)
    with (
        running(chosen, lambda *_: fake) as client,
        ThreadPoolExecutor(8) as pool,
        httpx.Client(base_url=client.base_url, timeout=60) as second,
    ):
        slow = [pool.submit(ask, second, PICTURE, headers=bearer(ALICE), **GOOD) for _ in range(6)]
        until(lambda: sum(one.done() for one in slow) == 2)  # half of 8 places, and no more
        for one in slow:
            if one.done():
                assert "4 requests of this token" in error_in(one.result(), 429, "QUOTA_EXCEEDED")
                assert int(one.result().headers["retry-after"]) >= 1
        until(lambda: fake.asked == 2)  # of 3 turns
        quick = pool.submit(ask, client, PICTURE, headers=bearer(BOB), **GOOD)
        until(lambda: fake.asked == 3)
        fake.gate.set()
        assert quick.result().status_code == 200
        assert sorted(one.result().status_code for one in slow) == [200] * 4 + [429] * 2


def test_a_token_has_its_own_concurrency(tmp_path: Path) -> None:
    path = two_callers(tmp_path, alice="concurrency = 1")
    fake = Gated()
    chosen = GatewaySettings("unused:1", tokens_file=path, concurrency=4)
    with running(chosen, lambda *_: fake) as client, ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(ask, client, PICTURE, headers=bearer(ALICE), **GOOD) for _ in range(3)
        ]
        time.sleep(0.5)
        assert fake.asked == 1
        fake.gate.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3


def test_shares_take_turns() -> None:
    async def order() -> list[str]:
        pool, seen = FairPool(1), []

        async def work(key: str) -> None:
            await pool.take(key)
            seen.append(key)
            await asyncio.sleep(0)
            pool.give(key)

        await asyncio.gather(*[work(key) for key in "aaaabbc"])
        assert pool.taken == 0
        return seen

    assert "".join(asyncio.run(order())) == "aabcaba"


def test_a_pool_forgets_who_has_gone_and_passes_nobody_over() -> None:
    async def check() -> None:
        pool = FairPool(10)
        await pool.take("a", 8)
        large = asyncio.create_task(pool.take("b", 5))
        small = asyncio.create_task(pool.take("c", 1))
        await asyncio.sleep(0.01)
        assert not large.done() and not small.done()  # behind the large one, though it would fit
        large.cancel()
        await asyncio.sleep(0.01)
        assert small.done() and pool.taken == 9
        pool.give("c", 1)
        own = asyncio.create_task(pool.take("a", 1, most=8))
        other = asyncio.create_task(pool.take("d", 2, most=8))
        await asyncio.sleep(0.01)
        assert other.done() and not own.done()  # it waits for its own share alone
        pool.give("a", 8)
        await asyncio.sleep(0.01)
        assert own.done() and pool.taken == 3
        pool.give("a", 1)
        pool.give("d", 2)
        await asyncio.wait_for(pool.take("e", 1000), 1)  # larger than all: alone
        granted = asyncio.create_task(pool.take("f", 1))
        await asyncio.sleep(0.01)
        pool.give("e", 1000)  # in the same moment the other goes
        granted.cancel()
        await asyncio.sleep(0.01)
        assert pool.taken == 0

    asyncio.run(check())


def test_bodies_wait_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regionspot.serving.gateway.admission.ROOM_WAIT_S", 0.5)
    fake = Gated()
    chosen = GatewaySettings("unused:1", max_buffered_bytes=100_000)
    with (
        running(chosen, lambda *_: fake) as client,
        raw(client) as slow,
        ThreadPoolExecutor(1) as pool,
    ):
        lines = ["Content-Length: 99000", "Content-Type: multipart/form-data; boundary=x"]
        slow.sendall(head(lines) + b"--x\r\n")  # and no more of it
        until(lambda: metric(client, "buffered_bytes") == 99_000)
        began = time.monotonic()
        refused = ask(client, PICTURE, **GOOD)
        assert 0.4 < time.monotonic() - began < 20
        assert "images are on their way" in error_in(refused, 503, "OVERLOADED")
        assert int(refused.headers["retry-after"]) >= 1
        waiting = pool.submit(ask, client, PICTURE, **GOOD)
        time.sleep(0.2)
        slow.close()
        until(lambda: fake.asked == 1)
        # what was reserved is what came
        assert len(PICTURE) < metric(client, "buffered_bytes") < len(PICTURE) + 200
        fake.gate.set()
        assert waiting.result().status_code == 200
        assert metric(client, "buffered_bytes") == 0
        # a single one that is larger than all of it is let in
        assert ask(client, encoded(300, 300), **GOOD).status_code == 200


# ------------------------------------------------------------------ handles


def test_handles_belong_to_their_caller(
    server: Any, tmp_path: Path, picture: Path, boxes: list[list[float]]
) -> None:
    """With a real server: whether others sent an image cannot be told, nor can theirs be used."""
    image = picture.read_bytes()
    with RegionClient(server.ports.grpc_url) as direct:
        expected = direct.recognize(picture, boxes, WORDS).to_json("toys.jpg")["regions"]
    path = two_callers(tmp_path)
    with (
        running(GatewaySettings(server.ports.grpc_url, tokens_file=path)) as client,
        running(GatewaySettings(server.ports.grpc_url, tokens_file=path)) as replica,
    ):
        first = ask(client, image, headers=bearer(ALICE), boxes=boxes, words=WORDS).json()
        assert first["regions"] == expected and first["cached"] is False
        again = ask(replica, image, headers=bearer(ALICE), boxes=boxes, words=WORDS).json()
        assert again["cached"] is True and again["image_handle"] == first["image_handle"]
        other = ask(client, image, headers=bearer(BOB), boxes=boxes, words=WORDS).json()
        assert other["cached"] is False and other["image_handle"] != first["image_handle"]
        assert other["regions"] == expected

        def by_handle(handle: str, token: str, gateway: httpx.Client = client) -> Any:
            return ask(
                gateway, headers=bearer(token), image_handle=handle, boxes=boxes, words=WORDS
            )

        for gateway in (client, replica):
            answer = by_handle(first["image_handle"], ALICE, gateway)
            assert answer.json()["regions"] == expected
        plain = first["image_handle"].partition(".")[0]
        tag = other["image_handle"].rpartition(".")[2]
        for stolen in (first["image_handle"], plain, f"{plain}.{tag}", sha256(image).hexdigest()):
            message = error_in(by_handle(stolen, BOB), 404, "IMAGE_UNKNOWN")
            unknown = error_in(by_handle("0" * 64, BOB), 404, "IMAGE_UNKNOWN")
            assert message == unknown


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "JPEG without its end"])
def test_the_mark_of_a_caller_does_not_change_the_image(
    server: Any, tmp_path: Path, picture: Path, boxes: list[list[float]], file_format: str
) -> None:
    marked = tmp_path / "image"
    Image.open(picture).convert("RGB").save(marked, file_format.partition(" ")[0])
    image = marked.read_bytes()
    if "without" in file_format:
        image = image.removesuffix(b"\xff\xd9")
    with (
        running(GatewaySettings(server.ports.grpc_url)) as client,
        running(
            GatewaySettings(server.ports.grpc_url, tokens_file=two_callers(tmp_path))
        ) as guarded,
    ):
        plain = ask(client, image, boxes=boxes, words=WORDS).json()
        named = ask(guarded, image, headers=bearer(BOB), boxes=boxes, words=WORDS).json()
    assert named["regions"] == plain["regions"]


def test_seals(tmp_path: Path) -> None:
    callers = {one.name: one for one in read_tokens(two_callers(tmp_path)).values()}
    alice, bob = (HandleSeal(callers[name].handle_key) for name in ("alice", "bob"))
    assert alice.open(alice.seal("abc")) == "abc"
    assert alice.suffix != bob.suffix and alice.suffix.isascii() and len(alice.suffix) == 32
    for wrong in ("abc", "", ".", bob.seal("abc"), alice.seal("abd").replace("abd", "abc")):
        with pytest.raises(RequestError) as refused:
            alice.open(wrong)
        assert refused.value.code == "IMAGE_UNKNOWN"
    # a token that changes changes the keys, unless there is a secret for them
    text = f'[alice]\ntoken = "{ALICE}"\n'
    keys = []
    for prefix in ("", 'handle_secret = "0123456789abcdef"\n'):
        for token in (ALICE, ALICE_NEW):
            path = tokens_file(tmp_path / "x.toml", prefix + text.replace(ALICE, token))
            keys += [one.handle_key for one in read_tokens(path).values()]
    assert keys[0] != keys[1] and keys[2] == keys[3] != keys[0]


# ------------------------------------------------------------------ sites and proxies


@pytest.mark.parametrize("path", ["/", "/v1/info", "/metrics", "/openapi.json", "/static/app.js"])
def test_a_gateway_of_this_machine_has_its_own_names(path: str) -> None:
    """A page may give its name the address 127.0.0.1."""
    with running(GatewaySettings("unused:1"), lambda *_: answering()) as client:
        port = client.base_url.port
        for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", f"[::1]:{port}", "[::1]"):
            assert client.get(path, headers={"Host": host}).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "a@b:1"):
            error_in(client.get(path, headers={"Host": host}), 403, "FORBIDDEN")
        assert client.get("/healthz", headers={"Host": "10.0.0.7:8080"}).status_code == 200
        with raw(client) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert_refused(connection, b" 403 ", b"FORBIDDEN")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this machine
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "OWN"}, 200),
        ({"Origin": "http://localhost:3000"}, 403),
    ],
)
def test_other_sites_do_not_ask(headers: dict[str, str], status: int) -> None:
    """A form is sent by any page, and without a token nobody is asked."""
    fake = answering()
    with running(GatewaySettings("unused:1"), lambda *_: fake) as client:
        own = str(client.base_url).rstrip("/")
        headers = {name: own if value == "OWN" else value for name, value in headers.items()}
        for path in ("/v1/info", "/metrics"):
            assert client.get(path, headers=headers).status_code == status
        answer = ask(client, PICTURE, headers=headers, **GOOD)
        assert (answer.status_code, fake.asked) == (status, int(status == 200))
        if status == 403:
            error_in(answer, 403, "FORBIDDEN")
        assert client.get("/", headers=headers).status_code == 200  # a link leads to the page
    with running(GatewaySettings("unused:1", token=ALICE), lambda *_: fake) as client:
        answer = client.get("/v1/info", headers=headers | bearer(ALICE))
        assert answer.status_code == 200  # the token says who asks


def test_allowed_hosts(tmp_path: Path) -> None:
    own = ("127.0.0.1", "regions.example")
    for chosen, foreign in (
        (GatewaySettings("unused:1", allowed_hosts=own), 403),
        (GatewaySettings("unused:1", allowed_hosts=own, allow_anonymous=True), 403),
        (GatewaySettings("unused:1", allowed_hosts=own, tokens_file=two_callers(tmp_path)), 403),
        (GatewaySettings("unused:1", allow_anonymous=True), 200),
        (GatewaySettings("unused:1", token=ALICE), 200),
    ):
        token = BOB if chosen.tokens_file else ALICE
        with running(chosen, lambda *_: answering()) as client:
            for host, status in {"regions.example:8080": 200, "evil.example": foreign}.items():
                answer = client.get("/v1/info", headers={"Host": host} | bearer(token))
                assert answer.status_code == status


def test_metrics_are_read_by_address() -> None:
    """As Prometheus does, with a token; without one, a page of another site could."""
    chosen = GatewaySettings("unused:1", token=ALICE, allowed_hosts=("regions.example",))
    by_address = {"Host": "10.0.0.7:8080"}
    with running(chosen, lambda *_: answering()) as client:
        assert client.get("/metrics", headers=by_address | bearer(ALICE)).status_code == 200
        error_in(client.get("/v1/info", headers=by_address | bearer(ALICE)), 403, "FORBIDDEN")
        error_in(client.get("/metrics", headers=by_address), 401, "UNAUTHORIZED")


def test_addresses_behind_proxies(capfd: pytest.CaptureFixture[str]) -> None:
    header = {"X-Forwarded-For": "203.0.113.9, 198.51.100.7"}
    for proxies, client_address in (((), "127.0.0.1"), (("127.0.0.0/8",), "198.51.100.7")):
        chosen = GatewaySettings("unused:1", trusted_proxies=proxies)
        with running(chosen, Untouched) as client:
            client.get("/nowhere", headers=header)
            lines: list[dict[str, Any]] = []
            until(lambda lines=lines: lines.extend(log_lines(capfd)) or lines)  # type: ignore[misc]
        assert lines[0]["client"] == client_address


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["1.2.3.4, <script>"], "10.0.0.1"),
        ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("9.9.9.9", ["1.2.3.4"], "9.9.9.9"),
        ("", ["1.2.3.4"], ""),
    ],
)
def test_who_stands_behind_a_proxy(peer: str, forwarded: list[str], client: str) -> None:
    raw_headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    assert Proxies(("10.0.0.0/8",)).client_of(peer, Headers(raw=raw_headers)) == client


def test_networks_that_are_none() -> None:
    for wrong in ("proxy.example", "10.0.0.0/99", ""):
        with pytest.raises(InputError, match="trusted_proxies"):
            GatewaySettings("unused:1", trusted_proxies=(wrong,))


def test_refusals_carry_their_status() -> None:
    assert (HttpError("QUOTA_EXCEEDED", "x").status, HttpError("FORBIDDEN", "x").status) == (
        429,
        403,
    )
