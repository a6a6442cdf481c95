"""Where the time of one run goes, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Seconds of each stage. A stage within another one is not counted in the outer, so that they
    add up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def clear(self) -> None:
        """Forget what was measured."""
        self.seconds = {}

    def begin(self, name: str) -> None:
        """From now on time is the stage's, until `end`."""
        self._charge()
        self._open.append(name)

    def switch(self, name: str) -> None:
        """The innermost open stage ends, and another one begins in its place."""
        self._charge()
        self._open[-1] = name

    def end(self) -> None:
        """From now on time is the outer stage's."""
        self._charge()
        self._open.pop()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
