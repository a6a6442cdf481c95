"""Vocabularies that a gateway keeps: named lists of words, which callers put, read and delete while
it runs.

The model server knows nothing of them: it is sent the words. So any number of servers stand behind
a gateway, and any number of gateways share a folder. A server encodes a word once and keeps it; the
gateway has it learn a new vocabulary before anybody needs to wait for it (`Learner`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regionspot.errors import ArtifactError, InputError
from regionspot.files import write_atomically
from regionspot.serving.contract import RequestError, ServingError, coded, version_of
from regionspot.serving.gateway.errors import HttpError
from regionspot.serving.gateway.fleet import Fleet
from regionspot.serving.messages import Question, check_words
from regionspot.serving.protocols import ServerInfo
from regionspot.structures import as_class_names
from regionspot.vocabulary_files import names_in_file

logger = logging.getLogger(__name__)

Json = dict[str, Any]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
OWN_SUFFIX = ".json"
"""Of the files that are written here; files of other kinds are read alone."""

MAX_VOCABULARIES = 1000
CHUNK = 32
"""Words that servers learn in one request of the gateway's."""

REFRESH_S = 2.0
"""How often the folder is looked at."""

RETRY_S = 5.0
"""Between attempts to have a server learn words, while it cannot."""


@dataclass(frozen=True)
class NamedWords:
    """A vocabulary.

    Args:
        version: changes with the words and their order.
        stamp: of its file, to see when that changes.
    """

    name: str
    words: tuple[str, ...]
    version: str
    stamp: tuple[int, ...] = ()


class VocabularyFolder:
    """Vocabularies as files of a folder: NAME.json for those that callers put, and any that
    `regionspot.vocabulary_files.names_in_file` reads. Safe for several threads at once.

    Args:
        folder: None keeps them in memory alone.

    Raises:
        InputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._found: dict[str, NamedWords] = {}
        self._damaged: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                list(folder.iterdir())
            except OSError as error:
                raise InputError(
                    f"the folder of vocabularies {folder} cannot be used ({error.strerror}): name "
                    "another with --vocabularies"
                ) from error
            self.refresh()

    def all(self) -> Mapping[str, NamedWords]:
        """By name, sorted."""
        return dict(sorted(self._found.items()))

    def get(self, name: str) -> NamedWords | None:
        return self._found.get(name)

    def put(self, name: str, words: Sequence[str]) -> NamedWords:
        """Keeps a vocabulary, in place of one of the same name.

        Raises:
            RequestError: a name or words that cannot be used.
            ServingError: INTERNAL, the folder cannot be written.
        """
        check_name(name)
        with coded("VOCABULARY_INVALID"):
            names = as_class_names(words)
        with self._lock:
            return self._put(name, names)

    def _put(self, name: str, names: tuple[str, ...]) -> NamedWords:
        if name not in self._found and len(self._found) >= MAX_VOCABULARIES:
            raise RequestError(
                "VOCABULARY_INVALID",
                f"there are {len(self._found)} vocabularies, which is the most: delete one",
            )
        path = self._own_path(name)
        if path is not None:
            content = json.dumps(list(names), ensure_ascii=False, indent=0).encode()
            try:
                write_atomically(path, content)
            except ArtifactError as error:
                raise ServingError("INTERNAL", str(error)) from error
        found = NamedWords(name, names, version_of(names), () if path is None else _stamp(path))
        self._found[name] = found
        return found

    def delete(self, name: str) -> bool:
        """Forgets a vocabulary. Returns whether there was one.

        Raises:
            RequestError: its file was not put by a caller.
            ServingError: INTERNAL, the file cannot be removed.
        """
        with self._lock:
            if name not in self._found:
                return False
            path = self._own_path(name)
            if path is not None:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise ServingError("INTERNAL", f"{path} cannot be removed: {error}") from error
            del self._found[name]
        return True

    def refresh(self) -> list[NamedWords]:
        """Reads files that are new or have changed, and forgets those that are gone. A file that
        cannot be used is logged once, and leaves the words that it had.

        Returns:
            The vocabularies that are new or have changed.
        """
        if self._folder is None:
            return []
        with self._lock:
            return self._refresh()

    def _refresh(self) -> list[NamedWords]:
        changed = []
        present = self._files()
        for name, path in present.items():
            stamp, known = _stamp(path), self._found.get(name)
            if stamp in (known.stamp if known else None, self._damaged.get(name)):
                continue
            try:
                check_name(name)
                words = names_in_file(path)
            except InputError as error:
                self._damaged[name] = stamp
                logger.warning(f"the vocabulary {name} is not read: {error}")
                continue
            self._damaged.pop(name, None)
            self._found[name] = NamedWords(name, words, version_of(words), stamp)
            if known is None or known.words != words:
                changed.append(self._found[name])
        for name in set(self._found) - set(present):
            del self._found[name]
        return changed

    def _files(self) -> dict[str, Path]:
        """By vocabulary; of several files of one name the one that a caller put."""
        assert self._folder is not None
        try:
            paths = sorted(self._folder.iterdir(), key=lambda path: path.suffix == OWN_SUFFIX)
        except OSError as error:
            logger.warning(f"the folder of vocabularies cannot be read: {error}")
            return {one.name: self._folder / one.name for one in self._found.values()}
        return {
            path.stem: path for path in paths if not path.name.startswith(".") and path.is_file()
        }

    def _own_path(self, name: str) -> Path | None:
        """Where a vocabulary that callers put is kept; None where none is on disk.

        Raises:
            RequestError: there is a file of that name which no caller put.
        """
        if self._folder is None:
            return None
        path = self._files().get(name)
        if path is not None and path.suffix != OWN_SUFFIX:
            raise RequestError(
                "VOCABULARY_INVALID",
                f"the vocabulary {name} is a file of the operator's, {path.name}: choose another "
                "name, or have the file changed",
            )
        return self._folder / f"{name}{OWN_SUFFIX}"


def check_name(name: str) -> None:
    """Raises RequestError for a name that no vocabulary may have."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            "VOCABULARY_INVALID",
            "a vocabulary's name is up to 64 letters, digits, _, - and dots, and begins with a "
            "letter or a digit",
        )


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


class LiveVocabularies:
    """What routes do about vocabularies: those of a folder, beside those of the model server, which
    come first.
    """

    def __init__(self, folder: Path | None, fleet: Fleet) -> None:
        self._folder = VocabularyFolder(folder)
        self._fleet = fleet
        self._learner = Learner(fleet.teach)

    def list(self, info: ServerInfo) -> list[Json]:
        """Of each vocabulary its name, version and number of words."""
        found = [self._told(one, info) for one in self._folder.all().values()]
        return [*(_told_by_server(name, info) for name in info.vocabularies), *found]

    def show(self, name: str, info: ServerInfo) -> Json:
        """A vocabulary with its words.

        Raises:
            HttpError: VOCABULARY_UNKNOWN, 404.
        """
        if name in info.vocabularies:
            return _told_by_server(name, info) | {"words": list(info.vocabularies[name])}
        found = self._folder.get(name)
        if found is None:
            raise _unknown()
        return self._told(found, info) | {"words": list(found.words)}

    def put(self, name: str, words: Sequence[str], info: ServerInfo) -> bool:
        """Keeps a vocabulary, and has the servers learn its words from now on. Returns whether
        there was none of that name.

        Raises:
            RequestError: a name or words that cannot be used.
        """
        self._check_own(name, info)
        check_words(words, info.limits)
        is_new = self._folder.get(name) is None
        self._start(self._folder.put(name, words), info)
        return is_new

    def delete(self, name: str, info: ServerInfo) -> None:
        """Raises HttpError VOCABULARY_UNKNOWN, 404; RequestError for one of the server's."""
        self._check_own(name, info)
        if not self._folder.delete(name):
            raise _unknown()

    def resolve(self, question: Question, info: ServerInfo) -> Question:
        """A question with the words of a vocabulary that is kept here, in place of its name.

        Raises:
            HttpError: OVERLOADED, the servers are still learning them.
        """
        name = question.vocabulary
        if not isinstance(name, str) or name in info.vocabularies:
            return question
        found = self._folder.get(name)
        if found is None:
            return question
        if len(found.words) - self._learner.learnt(found) > info.limits.max_new_words:
            raise self._being_learnt(found, info)
        return replace(question, vocabulary=found.words)

    def why_refused(self, error: RequestError, name: object, info: ServerInfo) -> Exception:
        """What to say of a refusal of a question whose vocabulary was `name`: a server that is new
        may not know the words of one yet.
        """
        found = self._folder.get(name) if isinstance(name, str) else None
        if found is None or error.code != "TOO_MANY_WORDS":
            return error
        self._learner.forget(found)
        return self._being_learnt(found, info)

    def _being_learnt(self, vocabulary: NamedWords, info: ServerInfo) -> HttpError:
        """Has the servers learn a vocabulary; what to say meanwhile."""
        self._start(vocabulary, info)
        learnt, count = self._learner.learnt(vocabulary), len(vocabulary.words)
        return HttpError(
            "OVERLOADED",
            f"the vocabulary is being learnt, {learnt} of {count} words by now: come back later",
            headers={"Retry-After": str(math.ceil(RETRY_S))},
        )

    async def watch(self) -> None:
        """Looks at the folder now and then, and has the servers learn what is new. Never
        returns.
        """
        while True:
            await asyncio.to_thread(self._folder.refresh)
            with suppress(ServingError):
                info = await self._fleet.info()
                for vocabulary in self._folder.all().values():
                    self._start(vocabulary, info)
            await asyncio.sleep(REFRESH_S)

    async def close(self) -> None:
        await self._learner.close()

    def _start(self, vocabulary: NamedWords, info: ServerInfo) -> None:
        self._learner.start(vocabulary, min(info.limits.max_new_words, CHUNK))

    def _told(self, vocabulary: NamedWords, info: ServerInfo) -> Json:
        return {
            "name": vocabulary.name,
            "words": len(vocabulary.words),
            "version": vocabulary.version,
            "learnt": self._learner.learnt(vocabulary),
        }

    def _check_own(self, name: str, info: ServerInfo) -> None:
        if name in info.vocabularies:
            raise RequestError(
                "VOCABULARY_INVALID",
                "the model server has a vocabulary of that name, which `regionspot-serve init` "
                "changes: choose another name",
            )


def _told_by_server(name: str, info: ServerInfo) -> Json:
    words = info.vocabularies[name]
    return {
        "name": name,
        "words": len(words),
        "version": version_of(words),
        "learnt": len(words),
    }


def _unknown() -> HttpError:
    return HttpError("VOCABULARY_UNKNOWN", "no vocabulary of that name is registered", status=404)


class Learner:
    """Has model servers learn the words of vocabularies, one vocabulary after another. For one
    event loop.

    Args:
        teach: sends some words to the model servers, and returns when all of them know them.
    """

    def __init__(self, teach: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        self._teach = teach
        self._known: dict[str, int] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def learnt(self, vocabulary: NamedWords) -> int:
        """How many words of a vocabulary the servers know."""
        return self._known.get(vocabulary.version, 0)

    def start(self, vocabulary: NamedWords, chunk: int) -> None:
        """Begins, unless it has been done or is being done. Does not wait.

        Args:
            chunk: words that a server learns in one request.
        """
        version = vocabulary.version
        if version not in self._tasks and self.learnt(vocabulary) < len(vocabulary.words):
            self._tasks[version] = asyncio.create_task(self._learn(vocabulary, chunk))
            self._tasks[version].add_done_callback(lambda _: self._tasks.pop(version, None))

    def forget(self, vocabulary: NamedWords) -> None:
        """A server does not know the words (any more)."""
        if vocabulary.version not in self._tasks:
            self._known.pop(vocabulary.version, None)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _learn(self, vocabulary: NamedWords, chunk: int) -> None:
        began = time.monotonic()
        while (done := self.learnt(vocabulary)) < len(vocabulary.words):
            words = vocabulary.words[done : done + chunk]
            try:
                await self._teach(words)
            except RequestError as error:
                # questions with it will be told so by the server
                logger.warning(f"the vocabulary {vocabulary.name} cannot be learnt: {error}")
                self._known[vocabulary.version] = len(vocabulary.words)
                return
            except ServingError as error:
                logger.info(f"the vocabulary {vocabulary.name} is not learnt yet: {error}")
                await asyncio.sleep(RETRY_S)
            else:
                self._known[vocabulary.version] = done + len(words)
        took_s = time.monotonic() - began
        logger.info(
            f"the vocabulary {vocabulary.name}, version {vocabulary.version}, was learnt in "
            f"{took_s:.1f} s"
        )
