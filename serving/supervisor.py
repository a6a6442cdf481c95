"""Keeps a Triton server answering: reloads models whose process died, restarts a server that died
or hangs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence

from regionspot.errors import RegionSpotError
from regionspot.serving import canary
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import MODEL, ServingError
from regionspot.serving.server import POLL_S, TritonServer
from regionspot.serving.triton import Connection

logger = logging.getLogger(__name__)

CANARY_PERIOD_S = 10.0
CANARY_TIMEOUT_S = 30.0
HANG_S = 600.0
"""A server is restarted when the canary has waited for this long, and nobody else was answered
either.
"""

MAX_RESTARTS = 10
"""The supervisor gives up after more restarts and reloads than this within `RESTART_WINDOW_S`."""

RESTART_WINDOW_S = 300.0


class Supervisor:
    """Watches a server that was started, and repairs it. Logs a sentence for each event."""

    def __init__(self, server: TritonServer) -> None:
        self.server = server
        self._restart_times: list[float] = []
        self._canary = CanaryThread(server)

    def run(self) -> None:
        """Runs until an exception, such as that of a signal handler, ends it.

        Raises:
            ServingError: The server failed more than `MAX_RESTARTS` times in a row.
        """
        self._canary.start()
        try:
            while True:
                time.sleep(POLL_S)
                self._check()
        finally:
            self._canary.stop()

    def _check(self) -> None:
        if not self.server.running:
            self._restart(f"the Triton server ended:\n{self.server.log_tail()}")
        elif missing := self.server.missing_stubs():
            self._reload(missing, "its process is gone")
        elif self._canary.hangs():
            self._restart(f"the Triton server has answered nobody for {HANG_S:.0f} s")
        elif (failure := self._canary.failure) is not None:
            self._reload([MODEL], f"it fails the canary ({failure})")

    def _reload(self, models: Sequence[str], reason: str) -> None:
        self._count_restart()
        for model in models:
            logger.info(f"reloading {model}: {reason}")
            try:
                self.server.reload(model)
            except ServingError as error:
                if self.server.running:
                    self._restart(f"{model} cannot be reloaded ({error})")
                return
        self._canary.reset()
        logger.info(f"reloaded {', '.join(models)}")

    def _restart(self, reason: str) -> None:
        logger.info(f"{reason}\nrestarting it")
        self.server.stop()
        self._count_restart()
        self.server.start()
        try:
            self.server.wait_ready()
            logger.info("the server was restarted")
        except ServingError as error:
            logger.info(str(error))  # the next check tries again
        self._canary.reset()

    def _count_restart(self) -> None:
        """Raises ServingError after more than `MAX_RESTARTS` within `RESTART_WINDOW_S`."""
        now = time.monotonic()
        recent = [moment for moment in self._restart_times if now - moment < RESTART_WINDOW_S]
        self._restart_times = [*recent, now]
        if len(self._restart_times) > MAX_RESTARTS:
            raise ServingError(
                "UNAVAILABLE",
                f"giving up: the server failed {len(self._restart_times)} times in a row",
            )


class CanaryThread:
    """Asks the canary's question every `CANARY_PERIOD_S`, and keeps the result for the supervisor.

    Attributes:
        failure: Why the last canary failed; None if it passed, or had no answer yet.
    """

    def __init__(self, server: TritonServer) -> None:
        self.failure: str | None = None
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="canary", daemon=True)
        self._waiting_since: float | None = None
        self._execution_count: int | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(POLL_S)  # it may be waiting for an answer; it dies with the process

    def reset(self) -> None:
        """Forgets earlier results, after a restart."""
        self.failure = None
        self._waiting_since = None

    def hangs(self) -> bool:
        """Returns whether the server has answered neither the canary nor anybody else for
        `HANG_S`.
        """
        since = self._waiting_since
        return since is not None and time.monotonic() - since > HANG_S

    def _run(self) -> None:
        while not self._stop.wait(CANARY_PERIOD_S):
            try:
                with RegionClient(
                    self._server.ports.grpc_url, CANARY_TIMEOUT_S, retry=False
                ) as client:
                    canary.check(client, CANARY_TIMEOUT_S)
                self.reset()
            except ServingError as error:
                if error.code in ("TIMEOUT", "UNAVAILABLE"):
                    self._check_progress()
                else:
                    self.failure = str(error)
            except Exception as error:
                self.failure = repr(error)

    def _check_progress(self) -> None:
        """Restarts the waiting time if the server has answered others: under load the canary waits
        in a queue.
        """
        count = None
        with (
            contextlib.suppress(RegionSpotError),
            Connection(self._server.ports.grpc_url, POLL_S) as connection,
        ):
            count = int(connection.statistics().get("execution_count", 0))
        if self._waiting_since is None or (count is not None and count != self._execution_count):
            self._execution_count = count
            self._waiting_since = time.monotonic()
