"""Vocabularies that a gateway keeps: files, versions, and having servers learn them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from regionspot.errors import InputError
from regionspot.serving.contract import RequestError, ServingError, error_of, version_of
from regionspot.serving.gateway import vocabularies, vocabulary_folder
from regionspot.serving.gateway.vocabularies import Learner
from regionspot.serving.gateway.vocabulary_folder import NamedWords, VocabularyFolder


def test_put_get_delete(tmp_path: Path) -> None:
    folder = VocabularyFolder(tmp_path / "new" / "folder")
    put = folder.put("pets", ["cat", "dog"])
    assert put == folder.get("pets") and put.words == ("cat", "dog")
    assert put.version == version_of(["cat", "dog"]) != version_of(["dog", "cat"])
    assert VocabularyFolder(tmp_path / "new" / "folder").all() == {"pets": put}, "it is stored"
    again = folder.put("pets", ["cat", "hamster"])
    assert again.version != put.version and folder.get("pets") == again
    assert folder.refresh() == [], "what was put here is no news"
    assert folder.delete("pets") and not folder.delete("pets")
    assert folder.all() == {} and list((tmp_path / "new" / "folder").iterdir()) == []


def test_in_memory_alone() -> None:
    folder = VocabularyFolder(None)
    folder.put("pets", ["cat", "dog"])
    assert folder.refresh() == [] and list(folder.all()) == ["pets"]
    assert folder.delete("pets") and folder.all() == {}


def test_several_gateways_share_a_folder(tmp_path: Path) -> None:
    one, other = VocabularyFolder(tmp_path), VocabularyFolder(tmp_path)
    put = one.put("pets", ["cat", "dog"])
    assert [found.words for found in other.refresh()] == [put.words]
    one.put("pets", ["cat", "hamster"])
    assert [found.words for found in other.refresh()] == [("cat", "hamster")]
    assert other.refresh() == []
    one.delete("pets")
    assert other.refresh() == [] and other.get("pets") is None


def test_a_folder_that_an_operator_fills(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "birds.txt").write_text("owl\ntit\n")
    (tmp_path / "fish.csv").write_text("name\ncod\neel\n")
    (tmp_path / "..data").mkdir()  # as Kubernetes mounts a ConfigMap
    (tmp_path / ".hidden.txt").write_text("no\n")
    (tmp_path / "bad name.txt").write_text("no\n")
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    with caplog.at_level(logging.WARNING, "regionspot"):
        folder = VocabularyFolder(tmp_path)
        folder.refresh()
    assert {name: found.words for name, found in folder.all().items()} == {
        "birds": ("owl", "tit"),
        "fish": ("cod", "eel"),
    }
    assert len(caplog.messages) == 2, "each damaged file is told once"
    (tmp_path / "birds.txt").write_bytes(b"\xff\xfeowl")  # half written
    assert folder.refresh() == []
    birds = folder.get("birds")
    assert birds is not None and birds.words == ("owl", "tit")
    (tmp_path / "birds.txt").write_text("owl\nkite\n")
    assert [found.words for found in folder.refresh()] == [("owl", "kite")]
    for change in (lambda: folder.put("birds", ["x"]), lambda: folder.delete("birds")):
        with pytest.raises(RequestError, match=r"file of the operator's, birds\.txt"):
            change()
    assert (tmp_path / "birds.txt").is_file()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a b", "-x", "x" * 65, "ä", "a\n", ".hidden"]
)
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    folder = VocabularyFolder(tmp_path)
    with pytest.raises(RequestError, match="a vocabulary's name is") as refused:
        folder.put(name, ["cat"])
    assert refused.value.code == "VOCABULARY_INVALID" and list(tmp_path.iterdir()) == []
    assert not folder.delete(name)


@pytest.mark.parametrize("words", [[], ["cat", "cat"], ["cat", " "], ["cat", 7]])
def test_words_that_are_refused(tmp_path: Path, words: list[str]) -> None:
    folder = VocabularyFolder(tmp_path)
    folder.put("pets", ["cat", "dog"])
    with pytest.raises(RequestError) as refused:
        folder.put("pets", words)
    assert refused.value.code == "VOCABULARY_INVALID"
    assert json.loads((tmp_path / "pets.json").read_text()) == ["cat", "dog"]


def test_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name another with --vocabularies"):
        VocabularyFolder(tmp_path / "file")
    folder = VocabularyFolder(tmp_path / "folder")
    os.rmdir(tmp_path / "folder")
    (tmp_path / "folder").write_text("in its place")
    with pytest.raises(ServingError) as refused:
        folder.put("pets", ["cat"])
    assert refused.value.code == "INTERNAL" and folder.get("pets") is None


def test_there_is_an_end_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_folder, "MAX_VOCABULARIES", 2)
    folder = VocabularyFolder(None)
    folder.put("a", ["cat"])
    folder.put("b", ["cat"])
    folder.put("b", ["dog"])
    with pytest.raises(RequestError, match="there are 2 vocabularies"):
        folder.put("c", ["cat"])


def test_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabularies, "RETRY_S", 0.0)
    words = tuple(f"word {index}" for index in range(10))
    vocabulary = NamedWords("ten", words, version_of(words))
    asked: list[Sequence[str]] = []

    async def teach(part: Sequence[str]) -> None:
        asked.append(part)
        if len(asked) == 2:
            raise error_of("OVERLOADED", "later")
        if "bad" in part:
            raise error_of("VOCABULARY_INVALID", "no")

    async def learn() -> None:
        learner = Learner(teach)
        learner.start(vocabulary, 4)
        learner.start(vocabulary, 4)
        while learner.learnt(vocabulary) < 10:
            await asyncio.sleep(0)
        assert asked == [words[:4], words[4:8], words[4:8], words[8:]]
        await asyncio.sleep(0)
        learner.start(vocabulary, 4)
        await asyncio.sleep(0)
        assert len(asked) == 4, "it was done before"
        learner.forget(vocabulary)
        learner.start(vocabulary, 10)
        while learner.learnt(vocabulary) < 10:
            await asyncio.sleep(0)
        bad = NamedWords("bad", ("bad",), version_of(["bad"]))
        learner.start(bad, 4)
        for _ in range(5):
            await asyncio.sleep(0)
        assert asked[-1] == ("bad",)
        count = len(asked)
        learner.start(bad, 4)
        await asyncio.sleep(0)
        assert len(asked) == count, "it is not asked again: questions are told why"
        await learner.close()

    asyncio.run(learn())
