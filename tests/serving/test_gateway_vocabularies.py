"""Vocabularies over HTTP, in front of the real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from regionspot.serving.client import RegionClient
from regionspot.serving.contract import version_of
from regionspot.serving.gateway import GatewaySettings
from regionspot.serving.gateway import vocabularies as live
from regionspot.serving.records import ServerRecord
from tests.serving.gateways import WORDS, ask, error_in, running

BOX = [[5, 5, 90, 90]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vocabularies"


@pytest.fixture
def gateway(server: ServerRecord, folder: Path) -> Iterator[httpx.Client]:
    with running(GatewaySettings(server.ports.grpc_url, vocabularies=folder)) as client:
        yield client


def until_learnt(gateway: httpx.Client, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found: dict[str, Any] = gateway.get(f"/v1/vocabularies/{name}").json()
        if found["learnt"] == len(found["words"]):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{name} was not learnt")


def test_put_ask_change_delete(gateway: httpx.Client, folder: Path, picture: Path) -> None:
    image = picture.read_bytes()
    by_words = ask(gateway, image, boxes=BOX, words=WORDS).json()
    created = gateway.put("/v1/vocabularies/toys", json={"words": WORDS})
    assert created.status_code == 201 and created.json()["words"] == WORDS
    found = until_learnt(gateway, "toys")
    assert found["version"] == version_of(WORDS) == created.json()["version"]
    answer = ask(gateway, image, boxes=BOX, vocabulary="toys").json()
    assert answer["regions"] == by_words["regions"]
    assert answer["vocabulary_version"] == found["version"]
    info = gateway.get("/v1/info").json()
    assert answer["model_version"] == info["model_version"] != ""
    listed = {one["name"]: one["words"] for one in info["vocabularies"]}
    assert listed["toys"] == 3 and listed["pets"] == 2
    assert gateway.get("/v1/vocabularies").json()["vocabularies"] == info["vocabularies"]

    changed = gateway.put("/v1/vocabularies/toys", json=[*WORDS, "white toy with a pink border"])
    assert changed.status_code == 200 and changed.json()["version"] != found["version"]
    until_learnt(gateway, "toys")
    again = ask(gateway, image, boxes=BOX, vocabulary="toys", top_k=4).json()
    assert len(again["regions"][0]["top"]) == 4
    assert again["vocabulary_version"] == changed.json()["version"]
    with RegionClient(str(gateway.base_url)) as client:
        assert len(client.recognize(picture, BOX, "toys").class_names) == 4

    assert [path.name for path in folder.iterdir()] == ["toys.json"]
    assert gateway.delete("/v1/vocabularies/toys").status_code == 204
    error_in(gateway.delete("/v1/vocabularies/toys"), 404, "VOCABULARY_UNKNOWN")
    error_in(gateway.get("/v1/vocabularies/toys"), 404, "VOCABULARY_UNKNOWN")
    error_in(ask(gateway, image, boxes=BOX, vocabulary="toys"), 422, "VOCABULARY_UNKNOWN")
    assert list(folder.iterdir()) == []


def test_what_is_refused(gateway: httpx.Client, folder: Path) -> None:
    path = "/v1/vocabularies/toys"
    for content in (b"", b"[1", b'{"words": 7}', b'{"words": ["cat"], "more": 1}', b"[7]"):
        error_in(gateway.put(path, content=content), 400, "REQUEST_INVALID")
    for words in ([], ["cat", "cat"], ["cat", " "], ["c" * 257]):
        error_in(gateway.put(path, json=words), 422, "VOCABULARY_INVALID")
    many = [f"word {index}" for index in range(2049)]
    error_in(gateway.put(path, json=many), 422, "TOO_MANY_WORDS")
    error_in(gateway.put(path, content=b" " * (5 << 20)), 413, "IMAGE_TOO_LARGE")
    for name in ("..%2Fx", "a%20b", "%2e%2e", "x" * 65):
        refused = gateway.put(f"/v1/vocabularies/{name}", json=["cat"])
        assert refused.status_code in (404, 422), refused.text
    for change in (
        gateway.put("/v1/vocabularies/pets", json=["cat"]),
        gateway.delete("/v1/vocabularies/pets"),
    ):
        assert "regionspot-serve init" in error_in(change, 422, "VOCABULARY_INVALID")
    assert list(folder.iterdir()) == []


def test_a_vocabulary_that_is_being_learnt(
    gateway: httpx.Client, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"{word}, variant {index}" for word in WORDS for index in range(60)]
    assert gateway.put("/v1/vocabularies/many", json=words).status_code == 201
    early = ask(gateway, picture.read_bytes(), boxes=BOX, vocabulary="many")
    if early.status_code != 200:
        message = error_in(early, 503, "OVERLOADED")
        assert "is being learnt" in message and int(early.headers["Retry-After"]) >= 1
    until_learnt(gateway, "many")
    answer = ask(gateway, picture.read_bytes(), boxes=BOX, vocabulary="many")
    assert answer.status_code == 200, answer.text


def test_a_folder_that_is_watched(
    gateway: httpx.Client, folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "REFRESH_S", 0.1)
    (folder / "from_outside.txt").write_text("\n".join(WORDS))
    deadline = time.monotonic() + 30
    while gateway.get("/v1/vocabularies/from_outside").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    until_learnt(gateway, "from_outside")
    answer = ask(gateway, picture.read_bytes(), boxes=BOX, vocabulary="from_outside")
    assert answer.status_code == 200
    error_in(gateway.put("/v1/vocabularies/from_outside", json=["x"]), 422, "VOCABULARY_INVALID")
    (folder / "from_outside.txt").unlink()
    while gateway.get("/v1/vocabularies/from_outside").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_who_may_change_them(server: ServerRecord, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        '[editor]\ntoken = "token-of-the-editor"\nvocabularies = true\n'
        'new_words_per_minute = 5\n[reader]\ntoken = "token-of-the-reader"\n'
    )
    path = "/v1/vocabularies/toys"
    editor = {"Authorization": "Bearer token-of-the-editor"}
    reader = {"Authorization": "Bearer token-of-the-reader"}
    with running(GatewaySettings(server.ports.grpc_url, tokens_file=tokens)) as client:
        error_in(client.put(path, json=WORDS), 401, "UNAUTHORIZED")
        error_in(client.put(path, json=WORDS, headers=reader), 403, "FORBIDDEN")
        assert client.put(path, json=WORDS, headers=editor).status_code == 201
        assert client.get(path, headers=reader).json()["words"] == WORDS
        error_in(client.delete(path, headers=reader), 403, "FORBIDDEN")
        error_in(client.put(path, json=["a", "b", "c"], headers=editor), 429, "QUOTA_EXCEEDED")
        assert client.delete(path, headers=editor).status_code == 204
