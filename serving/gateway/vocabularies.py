"""Vocabularies that a gateway keeps: named lists of words, which callers put, read and delete while
it runs.

The model server knows nothing of them: it is sent the words. So any number of servers stand behind
a gateway, and any number of gateways share a folder. A server encodes a word once and keeps it; the
gateway has it learn a new vocabulary before anybody needs to wait for it (`Learner`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import replace
from pathlib import Path
from typing import Any

from regionspot.serving.contract import RequestError, ServingError, version_of
from regionspot.serving.gateway.errors import HttpError
from regionspot.serving.gateway.fleet import Fleet
from regionspot.serving.gateway.vocabulary_folder import NamedWords, VocabularyFolder
from regionspot.serving.messages import Question, check_words
from regionspot.serving.protocols import ServerInfo

logger = logging.getLogger(__name__)

Json = dict[str, Any]
CHUNK = 32
"""Words that servers learn in one request of the gateway's."""

REFRESH_S = 2.0
"""How often the folder is looked at."""

RETRY_S = 5.0
"""Between attempts to have a server learn words, while it cannot."""


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
        names = dict.fromkeys([*info.vocabularies, *self._folder.all()])
        found = [self._find(name, info) for name in names]
        return [self._told(one, info) for one in found if one is not None]

    def show(self, name: str, info: ServerInfo) -> Json:
        """A vocabulary with its words.

        Raises:
            HttpError: VOCABULARY_UNKNOWN, 404.
        """
        found = self._find(name, info)
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

    def _find(self, name: str, info: ServerInfo) -> NamedWords | None:
        words = info.vocabularies.get(name)
        if words is None:
            return self._folder.get(name)
        return NamedWords(name, words, version_of(words))

    def _told(self, vocabulary: NamedWords, info: ServerInfo) -> Json:
        count, is_servers = len(vocabulary.words), vocabulary.name in info.vocabularies
        return {
            "name": vocabulary.name,
            "words": count,
            "version": vocabulary.version,
            "learnt": count if is_servers else self._learner.learnt(vocabulary),
        }

    def _check_own(self, name: str, info: ServerInfo) -> None:
        if name in info.vocabularies:
            raise RequestError(
                "VOCABULARY_INVALID",
                "the model server has a vocabulary of that name, which `regionspot-serve init` "
                "changes: choose another name",
            )


def _unknown() -> HttpError:
    return HttpError("VOCABULARY_UNKNOWN", "no vocabulary of that name is registered", status=404)


class Learner:
    """Has model servers learn the words of vocabularies, each in a task of its own. For one event
    loop.

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
            self._tasks[version] = asyncio.create_task(
                self._learn(vocabulary, chunk),
                context=Context(),  # not of the request that it outlives
            )
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
