"""Encodes words that are new to the server: beside the requests about images, one word of each
request in turn, and as long as somebody waits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable

from regionspot.serving.backends.budget import POLL_S, Budget
from regionspot.serving.contract import ServingError
from regionspot.structures import FloatArray
from regionspot.vocabulary import VocabularyEncoder


class WordQueue:
    """The text encoder's only user, in a thread of its own. Words go through it one by one: so no
    embedding depends on the company it is in, and a request with one new word waits for one word
    of every other request, not for all of them. Safe for several threads at once.

    Args:
        encoder: with a store that remembers.
    """

    def __init__(self, encoder: VocabularyEncoder) -> None:
        self._encoder = encoder
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="words", daemon=True)
        self._thread.start()

    def learn(self, words: Iterable[str], seconds: float, budget: Budget) -> dict[str, FloatArray]:
        """The embeddings (E,) of words, new or not.

        Args:
            seconds: that the new ones may take.

        Raises:
            ServingError: OVERLOADED, some words were not encoded in time; those that were are kept,
                so that asking again goes on from there. TIMEOUT, the request is over.
            ArtifactError: the text encoder failed.
        """
        job = _Job(words)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        try:
            self._wait(job, seconds, budget)
        finally:
            job.dropped = True
        if job.error is not None:
            raise job.error
        return job.found

    def close(self) -> None:
        """Ends the thread after the word that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _wait(self, job: _Job, seconds: float, budget: Budget) -> None:
        deadline = time.monotonic() + seconds
        while not job.done.wait(POLL_S):
            budget.check()
            if time.monotonic() > deadline:
                raise ServingError(
                    "OVERLOADED",
                    f"{len(job.found)} of {len(job.found) + len(job.left)} new words were learnt "
                    f"in {seconds:g} s, and are kept: send the same request again to go on, or "
                    "have the words registered (regionspot-serve init --vocabulary)",
                )

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._learn_one(job)
            with self._changed:
                if job.left and not job.dropped and job.error is None:
                    self._jobs.append(job)  # behind the others
                else:
                    job.done.set()

    def _next(self) -> _Job | None:
        """The job whose turn it is; None when the queue was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            return None if self._closed else self._jobs.popleft()

    def _learn_one(self, job: _Job) -> None:
        if job.dropped or not job.left:
            return
        word = job.left[0]
        try:
            found = self._encoder.encode((word,), same_meaning="ignore", progress=False)
        except Exception as error:
            job.error = error
            return
        job.found[word] = found.embeddings[0]
        job.left.popleft()


class _Job:
    """The words of one request.

    Attributes:
        found: word -> embedding, of the words that are done.
        left: the others.
        dropped: nobody waits any more.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.left = deque(dict.fromkeys(words))
        self.found: dict[str, FloatArray] = {}
        self.error: Exception | None = None
        self.done = threading.Event()
        self.dropped = False
