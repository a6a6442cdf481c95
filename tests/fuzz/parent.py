"""Runs cases in child processes, and survives what they don't."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regionspot.progress import Progress
from tests.fuzz.target import SEED

CASE_SECONDS = 60.0
"""A case that takes longer hangs. Thousands of times what a case takes, for busy machines."""

SETUP_SECONDS = 300.0
BATCH = 250
FAILURES = ("crash", "hang", "out of memory", "untyped exception", "wrong answer")
MAX_STDERR = 4000


@dataclass(frozen=True)
class Failure:
    """One case that went wrong."""

    kind: str
    case: int
    outcome: str
    detail: str
    where: str = ""
    note: str = ""

    @property
    def group(self) -> tuple[str, str]:
        """Equal for failures that look like one fault."""
        return self.outcome, self.where or re.sub(r"'[^']*'|[-+.\d]+", "#", self.detail).split(
            ": "
        )[0][:60]


@dataclass
class Report:
    """What became of the cases of one kind."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, outcome: str, failure: Failure | None = None) -> None:
        self.outcomes[outcome] += 1
        if failure is not None:
            self.failures.append(failure)

    def extend(self, other: Report) -> None:
        self.outcomes.update(other.outcomes)
        self.failures += other.failures
        self.seconds += other.seconds


def run_kinds(
    directory: Path, ranges: dict[str, range], workers: int = 1, seed: int = SEED
) -> list[Report]:
    """Runs ranges of cases of some kinds, batch after batch, in several processes; shows how far it
    is.

    Args:
        directory: where inputs are written, in one folder for each process.
    """
    reports = {kind: Report(kind) for kind in ranges}
    total = sum(map(len, ranges.values()))
    lock, batches = threading.Lock(), _batches(ranges)
    with Progress("fuzzing", total, "cases") as progress, contextlib.ExitStack() as stack:

        def work(index: int) -> None:
            child = Child(directory / str(index), seed=seed)
            stack.callback(child.close)
            while True:
                with lock:
                    batch = next(batches, None)
                if batch is None:
                    return
                report = child.run(*batch)
                with lock:
                    reports[report.kind].extend(report)
                    failures = sum(len(report.failures) for report in reports.values())
                    done = sum(report.outcomes.total() for report in reports.values())
                    progress.update(done, f"{failures} failures")

        with ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(work, index) for index in range(workers)]:
                future.result()
    for report in reports.values():
        report.failures.sort(key=lambda failure: failure.case)
    return list(reports.values())


def _batches(ranges: dict[str, range]) -> Iterator[tuple[str, range]]:
    for kind, cases in ranges.items():
        for start in range(cases.start, cases.stop, BATCH):
            yield kind, range(start, min(start + BATCH, cases.stop))


class Child:
    """A process that runs cases, started when it is first needed and again after each death.

    Args:
        directory: where targets write their inputs.
        case_seconds: a case that takes longer is a hang.
    """

    def __init__(
        self, directory: Path, case_seconds: float = CASE_SECONDS, seed: int = SEED
    ) -> None:
        self._directory, self._case_seconds, self._seed = directory, case_seconds, seed
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def run(self, kind: str, cases: range) -> Report:
        """Runs the cases in order; a case that kills the process costs the others nothing."""
        report, began, start = Report(kind), time.monotonic(), cases.start
        while start < cases.stop:
            start = self._run_from(kind, start, cases.stop, report)
        report.seconds = time.monotonic() - began
        return report

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._end()

    def _run_from(self, kind: str, start: int, stop: int, report: Report) -> int:
        """The case to go on with: `stop`, or the one behind a case that killed the process."""
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(f"{kind} {start} {stop} {self._seed}\n".encode())
        process.stdin.flush()
        running: int | None = None
        notes: list[str] = []
        for answer in self._answers():
            if "finished" in answer:
                return stop
            if "begin" in answer:
                running, notes = answer["begin"], []
            elif "note" in answer:
                notes.append(answer["note"])
            else:
                report.add(answer["outcome"], _failure(kind, answer, notes))
        outcome, detail = self._why_it_died(hung=process.poll() is None)
        if running is None:
            raise RuntimeError(f"the {kind} cannot be set up: {detail}")
        report.add(outcome, Failure(kind, running, outcome, detail, note="; ".join(notes)))
        return running + 1

    def _answers(self) -> Iterator[dict[str, Any]]:
        """The child's lines, until it dies or says nothing for longer than any case may take."""
        assert self._process is not None and self._process.stdout is not None
        descriptor, patience = self._process.stdout.fileno(), SETUP_SECONDS
        while True:
            while b"\n" in self._unread:
                line, self._unread = self._unread.split(b"\n", 1)
                patience = 2 * self._case_seconds + 30
                yield json.loads(line)
            if not select.select([descriptor], [], [], patience)[0]:
                return
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                self._process.wait()
                return
            self._unread += chunk

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable,
                "-m",
                "tests.fuzz.child",
                str(self._directory),
                str(self._case_seconds),
            ]
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "REGIONSPOT_CACHE": str(self._directory / "cache"),
            }
            with open(self._directory / "stderr.txt", "wb") as stderr:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd=Path(__file__).parents[2],
                    env=environment,
                )
            self._unread = b""
        return self._process

    def _why_it_died(self, hung: bool) -> tuple[str, str]:
        code = self._end()
        lines = (self._directory / "stderr.txt").read_text(errors="replace")[-MAX_STDERR:]
        if hung or "Timeout (" in lines:
            return "hang", lines
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        return "crash", f"{name}: {lines}"

    def _end(self) -> int:
        assert self._process is not None
        process, self._process = self._process, None
        try:
            return process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _failure(kind: str, answer: dict[str, Any], notes: list[str]) -> Failure | None:
    if answer["outcome"] not in FAILURES:
        return None
    case, outcome, detail, where = (answer[name] for name in ("case", "outcome", "detail", "where"))
    return Failure(kind, case, outcome, detail, where, "; ".join(notes))
