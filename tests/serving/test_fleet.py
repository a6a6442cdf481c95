"""Several servers behind a gateway: images stay where they were encoded, servers come and go."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.serving.contract import Limits, RequestError, ServingError, error_of
from regionspot.serving.conversation import ServerInfo
from regionspot.serving.gateway import GatewaySettings, fleet
from regionspot.serving.gateway.fleet import Fleet
from regionspot.serving.messages import Answer, Question, RemoteImage
from regionspot.serving.records import ServerRecord, running_server
from regionspot.serving.server import ServerOptions
from regionspot.serving.triton import pipeline_from_triton
from regionspot.structures import RegionPredictions, as_prompts
from tests.serving.gateways import ask, running

BOX = [[1.0, 1.0, 20.0, 20.0]]
IMAGES = [f"image {index}".encode() for index in range(60)]


class Keeper:
    """A server that keeps images, and does as it is told."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self.kept: set[str] = set()
        self.asked: list[Question] = []
        self.failure: ServingError | None = None
        self.closed = False
        self.takes_s = 0.0

    async def info(self, refresh: bool = False) -> ServerInfo:
        if self.failure is not None:
            raise self.failure
        return ServerInfo(self.url, "none", "fp32", {}, Limits())

    async def ask(self, question: Question, **_: object) -> Answer:
        assert not self.closed
        self.asked.append(question)
        await asyncio.sleep(self.takes_s)
        if self.failure is not None:
            raise self.failure
        image = question.image
        handle = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image.handle
        cached = handle in self.kept
        if not cached and not isinstance(image, bytes):
            raise RequestError("IMAGE_UNKNOWN", "send the image")
        self.kept.add(handle)
        none = np.zeros((0, 1), np.float32)
        ids = none.astype(int)
        found = RegionPredictions(
            3, 4, none.reshape(0, 4), (self.url,), none[:, 0], ids[:, 0], ids, none
        )
        return Answer(found, RemoteImage(handle, 3, 4), cached)

    async def close(self) -> None:
        self.closed = True


class Keepers(dict[str, Keeper]):
    """By address."""

    def __call__(self, url: str, timeout_s: float) -> Keeper:
        self[url] = Keeper(url, timeout_s)
        return self[url]


def made(keepers: Keepers, url: str, **options: Any) -> Fleet:
    return Fleet(GatewaySettings(url, **options), keepers)


def question(image: bytes | str) -> Question:
    told = RemoteImage(image) if isinstance(image, str) else image
    return Question(told, ("cat", "dog"), as_prompts(BOX))


async def place(behind: Fleet, images: list[bytes] = IMAGES) -> dict[str, str]:
    """Handle -> the server that answered."""
    answers = [await behind.ask(question(image), "", 10) for image in images]
    return {answer.image.handle: answer.predictions.class_names[0] for answer in answers}


def test_an_image_stays_with_its_server() -> None:
    keepers = Keepers()
    behind = made(keepers, "a:1,b:1,c:1")

    async def work() -> None:
        placed = await place(behind)
        assert await place(behind) == placed
        for handle, server in placed.items():
            answer = await behind.ask(question(handle), "", 10)
            assert answer.cached and answer.predictions.class_names == (server,)
        counts = Counter(placed.values())
        assert set(counts) == {"a:1", "b:1", "c:1"} and min(counts.values()) >= 10
        assert await place(made(Keepers(), "c:1,a:1,b:1")) == placed, "any gateway says the same"
        fewer = await place(made(Keepers(), "a:1,c:1"))
        moved = {handle for handle, server in placed.items() if fewer[handle] != server}
        assert moved == {handle for handle, server in placed.items() if server == "b:1"}

    asyncio.run(work())


def test_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "RIDE_S", 0.3)
    keepers = Keepers()
    behind = made(keepers, "a:1,b:1")

    async def work() -> None:
        before = await place(behind)
        keepers["b:1"].failure = error_of("UNAVAILABLE", "gone")
        assert set((await place(behind)).values()) == {"a:1"}
        assert behind.state == "up" and (await behind.info()).model == "a:1"
        await behind.check()
        handle = next(handle for handle, server in before.items() if server == "b:1")
        assert (await behind.ask(question(handle), "", 10)).predictions.class_names == ("a:1",)
        with pytest.raises(ServingError) as unknown:
            await behind.ask(question("f" * 64), "", 10)
        assert unknown.value.code in ("IMAGE_UNKNOWN", "UNAVAILABLE")
        keepers["a:1"].failure = error_of("UNAVAILABLE", "gone")
        with pytest.raises(ServingError) as gone:
            await place(behind, IMAGES[:1])
        assert gone.value.code == "UNAVAILABLE" and behind.state == "down"
        keepers["a:1"].failure = keepers["b:1"].failure = None
        await place(behind)
        assert behind.state == "up"

    asyncio.run(work())


def test_what_is_no_failure_of_a_server_is_asked_once() -> None:
    keepers = Keepers()
    behind = made(keepers, "a:1,b:1")

    async def work() -> None:
        for code in ("OVERLOADED", "TIMEOUT", "INTERNAL", "REGION_INVALID"):
            for keeper in keepers.values():
                keeper.failure, keeper.asked = error_of(code, "no"), []
            with pytest.raises(ServingError) as refused:
                await place(behind, IMAGES[:1])
            assert refused.value.code == code
            assert sum(len(keeper.asked) for keeper in keepers.values()) == 1

    asyncio.run(work())


def test_one_image_that_everybody_asks_about_is_spread() -> None:
    keepers = Keepers()
    behind = made(keepers, "a:1,b:1,c:1")

    async def work() -> None:
        for keeper in keepers.values():
            keeper.takes_s = 0.5
        asked = [behind.ask(question(IMAGES[0]), "", 10) for _ in range(30)]
        await asyncio.gather(*asked)
        counts = sorted(len(keeper.asked) for keeper in keepers.values())
        assert counts[0] >= 3 and counts[-1] <= 14, counts
        handle = hashlib.sha256(IMAGES[0]).hexdigest()
        answers = await asyncio.gather(*(behind.ask(question(handle), "", 10) for _ in range(30)))
        assert all(answer.cached for answer in answers)

    asyncio.run(work())


def test_names_are_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"triton:8001": ["1.1.1.1:8001", "1.1.1.2:8001"]}

    async def servers_at(url: str) -> dict[str, None]:
        return dict.fromkeys(addresses[url])

    monkeypatch.setattr(fleet, "_servers_at", servers_at)
    monkeypatch.setattr(fleet, "RESOLVE_S", 0.0)
    keepers = Keepers()
    behind = made(keepers, "triton:8001")

    async def work() -> None:
        assert set((await place(behind)).values()) == {"1.1.1.1:8001", "1.1.1.2:8001"}
        addresses["triton:8001"] = ["1.1.1.2:8001", "1.1.1.3:8001"]
        assert set((await place(behind)).values()) == {"1.1.1.2:8001", "1.1.1.3:8001"}
        assert keepers["1.1.1.1:8001"].closed and not keepers["1.1.1.2:8001"].closed
        addresses["triton:8001"] = []  # DNS fails
        assert set((await place(behind)).values()) == {"1.1.1.2:8001", "1.1.1.3:8001"}
        await behind.close()
        assert all(keeper.closed for keeper in keepers.values())

    asyncio.run(work())


def test_addresses() -> None:
    async def looked_up() -> None:
        assert await fleet._servers_at("127.0.0.1:8001") == {"127.0.0.1:8001": None}
        assert await fleet._servers_at("[::1]:8001") == {"[::1]:8001": None}
        assert await fleet._servers_at("no-such-name.invalid:8001") == {}

    asyncio.run(looked_up())


def test_servers_of_one_name_over_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is reached by its address, and believed by the name."""
    made_for: dict[str, str | None] = {}

    class Seen(Keeper):
        def __init__(self, url: str, timeout_s: float, server_name: str | None = None) -> None:
            super().__init__(url, timeout_s)
            made_for[url] = server_name

    async def getaddrinfo(self: object, host: str, port: int, **_: object) -> list[object]:
        assert (host, port) == ("triton", 8001)
        return [(0, 0, 0, "", ("1.1.1.2", port)), (0, 0, 0, "", ("fe80::1", port, 0, 0))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    behind = fleet.Fleet(GatewaySettings("grpcs://triton:8001"), Seen)
    asyncio.run(behind.info())
    del made_for["grpcs://triton:8001"]  # before it was looked up
    assert made_for == {"grpcs://1.1.1.2:8001": "triton", "grpcs://[fe80::1]:8001": "triton"}


def test_a_canary_gets_its_share_of_the_images() -> None:
    keepers = Keepers()
    behind = made(keepers, "old:1", canary_url="new:1", canary_share=0.25)
    many = [f"image {index}".encode() for index in range(400)]

    async def work() -> None:
        placed = await place(behind, many)
        share = Counter(placed.values())["new:1"] / len(many)
        assert 0.18 < share < 0.32, share
        assert await place(behind, many) == placed, "always the same images"
        keepers["new:1"].failure = error_of("UNAVAILABLE", "gone")
        assert set((await place(behind, many)).values()) == {"old:1"}
        assert behind.state == "up" and (await behind.info()).model == "old:1"
        keepers["new:1"].failure, keepers["old:1"].failure = None, keepers["new:1"].failure
        assert behind.state == "up"
        only_new = [image for image in many if placed[hashlib.sha256(image).hexdigest()] != "old:1"]
        assert set((await place(behind, only_new)).values()) == {"new:1"}

    asyncio.run(work())
    with pytest.raises(InputError, match="canary_share"):
        GatewaySettings("a:1", canary_share=1.5)


def test_all_servers_are_taught() -> None:
    keepers = Keepers()
    behind = made(keepers, "a:1,b:1", canary_url="c:1")

    async def work() -> None:
        await behind.teach(["cat", "dog"])
        for keeper in keepers.values():
            assert [asked.vocabulary for asked in keeper.asked] == [("cat", "dog")]
        keepers["b:1"].failure = error_of("OVERLOADED", "later")
        with pytest.raises(ServingError, match="later"):
            await behind.teach(["cat"])

    asyncio.run(work())


@pytest.fixture(scope="module")
def second(repository: Path, home: Path) -> Iterator[ServerRecord]:
    """A server with the public model alone, once."""
    with running_server(repository, home, ServerOptions(instances=1)) as record:
        yield record


@pytest.fixture
def gateway(server: ServerRecord, second: ServerRecord) -> Iterator[httpx.Client]:
    """In front of two servers."""
    with running(GatewaySettings(f"{server.ports.grpc_url},{second.ports.grpc_url}")) as client:
        yield client


def test_graphs_that_are_not_loaded(second: ServerRecord) -> None:
    for url in (second.ports.grpc_url, second.ports.http_url):
        assert url is not None
        with pytest.raises(InputError, match="up --all-models"):
            pipeline_from_triton(url)


def test_handles_of_two_real_servers(gateway: httpx.Client, dataset: CocoDataset) -> None:
    question: dict[str, Any] = {"boxes": [[5, 5, 90, 90]], "vocabulary": "pets"}
    images = [dataset.image_path(image).read_bytes() for image in dataset.images[:12]]
    first = [ask(gateway, image, **question).json() for image in images]
    for answer in first:
        again = ask(gateway, None, image_handle=answer["image_handle"], **question)
        assert again.status_code == 200, again.text
        assert again.json()["cached"] and again.json()["regions"] == answer["regions"]
