"""How long one request may go on."""

from __future__ import annotations

import time
from collections.abc import Callable

from regionspot.serving.contract import ServingError

POLL_S = 0.1
"""How often somebody who waits for something looks whether it is still worth it."""


def never() -> bool:
    return False


class Budget:
    """The time of one request. It is over at the deadline, or when nobody waits for the answer.

    Args:
        seconds: until the deadline, from now.
        cancelled: returns whether nobody waits any more.
    """

    def __init__(self, seconds: float, cancelled: Callable[[], bool] = never) -> None:
        self._seconds, self._cancelled = seconds, cancelled
        self._deadline = time.monotonic() + seconds

    def check(self) -> None:
        """Call it between the stages of the work, and while waiting.

        Raises:
            ServingError: TIMEOUT.
        """
        if self._cancelled():
            raise ServingError("TIMEOUT", "the request was cancelled")
        if time.monotonic() > self._deadline:
            raise ServingError(
                "TIMEOUT",
                f"the request took more than {self._seconds:g} s, which is the server's limit: "
                "ask for fewer regions, or for no masks",
            )
