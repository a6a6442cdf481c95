"""Keeps a Triton server answering: restarts one that died, lost a process of its models, or hangs.

A restart takes as long as a start, and the server forgets the images that it has encoded.
One model alone could be loaded again only by Triton's API for models, which is closed to everybody.
"""

from __future__ import annotations

import logging
import threading
import time

from regionspot.errors import RegionSpotError
from regionspot.serving import canary
from regionspot.serving.contract import MODEL, ServingError
from regionspot.serving.log_file import LogFile
from regionspot.serving.server import POLL_S, TritonServer

logger = logging.getLogger(__name__)

CANARY_PERIOD_S = 10.0
CANARY_TIMEOUT_S = 30.0
HANG_S = 600.0
"""A server is restarted when the canary has waited for this long, and nobody else was answered
either, although it computes.
"""

IDLE_HANG_S = 60.0
"""The same for a server that does not compute, which hangs; see `CanaryThread.hang_s`."""

SLOWEST_ANSWERS = 20
WORKING_SHARE = 0.1
"""A server computes that uses this share of a core or more."""

FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0


class Supervisor:
    """Watches a server that was started, and restarts it where that helps. Logs a sentence for each
    event.

    Args:
        output: Where this process's own output goes, if it is a file that may grow without end.
    """

    def __init__(self, server: TritonServer, output: LogFile | None = None) -> None:
        self.server = server
        self._output = output
        self._failures = 0
        self._canary = CanaryThread(server)

    def run(self) -> None:
        """Runs until an exception, such as that of a signal handler, ends it."""
        self._canary.start()
        try:
            while True:
                time.sleep(POLL_S)
                self._check()
        finally:
            self._canary.stop()

    def _check(self) -> None:
        self.server.tidy()
        if self._output is not None:
            self._output.rotate()
        if not self.server.running:
            self._restart(f"the Triton server ended:\n{self.server.log_tail()}", drain=False)
        elif missing := self.server.missing_stubs():
            reason = f"a process of {', '.join(missing)} has ended"
            self._restart(reason, drain=MODEL not in missing)
        elif self._canary.hangs():
            hang_s = self._canary.hang_s()
            self._restart(f"the Triton server has answered nobody for {hang_s:.0f} s", drain=False)
        elif (failure := self._canary.failure) is not None:
            self._restart(f"the Triton server fails the canary ({failure})")

    def _restart(self, reason: str, drain: bool = True) -> None:
        """Starts the server again, and waits longer the more often that failed: what keeps it from
        starting, such as a full disk, may be over later.
        """
        logger.info(f"{reason}\nrestarting it")
        self.server.stop(drain)
        if self._failures:
            wait_s = pause_s(self._failures)
            logger.info(f"it failed to start {self._failures} times: waiting for {wait_s:.0f} s")
            time.sleep(wait_s)
        began = time.monotonic()
        try:
            self.server.start()
            self.server.wait_ready()
            self._failures = 0
            logger.info(f"the server was restarted in {time.monotonic() - began:.1f} s")
        except (RegionSpotError, OSError) as error:
            self._failures += 1
            logger.info(str(error))  # the next check tries again
        self._canary.reset()


def pause_s(failures: int) -> float:
    """Returns how long to wait before a start, after so many that failed."""
    doublings = min(failures - 1, 30)
    return min(FIRST_PAUSE_S * 2**doublings, MAX_PAUSE_S)


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
        self._executions: int | None = None
        self._computes = False
        self._slowest_s = 0.0

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
        `hang_s`.
        """
        since = self._waiting_since
        return since is not None and time.monotonic() - since > self.hang_s()

    def hang_s(self) -> float:
        """Returns after how many seconds without an answer the server hangs: `HANG_S` for one that
        computes, for a request may be long; else `IDLE_HANG_S`, or `SLOWEST_ANSWERS` times as long
        as the slowest canary took so far.
        """
        if self._computes:
            return HANG_S
        return min(max(IDLE_HANG_S, SLOWEST_ANSWERS * self._slowest_s), HANG_S)

    def _run(self) -> None:
        while not self._stop.wait(CANARY_PERIOD_S):
            asked, cpu_s = time.monotonic(), self._server.cpu_seconds()
            try:
                with self._server.client(CANARY_TIMEOUT_S) as client:
                    canary.check(client, CANARY_TIMEOUT_S)
                self._slowest_s = max(self._slowest_s, time.monotonic() - asked)
                self.reset()
            except ServingError as error:
                if error.code in ("TIMEOUT", "UNAVAILABLE", "OVERLOADED"):
                    self._look_for_progress(asked, cpu_s)
                else:
                    self.failure = str(error)
            except Exception as error:
                self.failure = repr(error)

    def _look_for_progress(self, asked: float, cpu_s: float) -> None:
        """Restarts the waiting time if the server has answered others: under load the canary waits
        in a queue. Notes whether it computes.

        Args:
            asked: When the canary was asked.
            cpu_s: The processor time that the server had used then.
        """
        now = time.monotonic()
        self._computes = self._server.cpu_seconds() - cpu_s > WORKING_SHARE * (now - asked)
        executions = canary.executions_so_far(self._server.url, POLL_S, **self._server.client_files)
        progress = executions is not None and executions != self._executions
        if self._waiting_since is None:
            self._waiting_since = asked
        elif progress:
            self._waiting_since = now
        self._executions = executions
