"""How far a long job is: one line that renews itself on a terminal, a line now and then anywhere
else.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

TERMINAL_INTERVAL_S = 0.1
LOG_INTERVAL_S = 15.0


class Progress:
    """Use as a context manager; call `update` as often as you like, it prints rarely.

    Args:
        label: what is being done.
        total: how many there are of `unit`, "images" or "steps".
        start: how many were done before.
        stream: standard error by default, since results may go to standard output.
    """

    def __init__(
        self, label: str, total: int, unit: str, start: int = 0, stream: TextIO | None = None
    ) -> None:
        self.label, self.total, self.unit, self.start = label, total, unit, start
        self.stream = stream or sys.stderr
        self.on_terminal = self.stream.isatty()
        self._began = time.monotonic()
        self._next = self._began
        self._last = ""
        self.done, self._note = start, ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self.on_terminal and self._last:
            self.stream.write("\n")
            self.stream.flush()

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the mean speed so far; None at the beginning."""
        done = self.done - self.start
        return (
            (time.monotonic() - self._began) / done * (self.total - self.done) if done > 0 else None
        )

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total` are finished; `note` goes behind it."""
        self.done, self._note = done, note or self._note
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (TERMINAL_INTERVAL_S if self.on_terminal else LOG_INTERVAL_S)
            self._show()

    def _show(self) -> None:
        parts = [f"{self.label}: {self.done}/{self.total} {self.unit}", self._note]
        if self.eta_s is not None:
            parts.append(f"{in_hours(self.eta_s)} to go" if self.done < self.total else "done")
        line = "  ".join(filter(None, parts))
        if line == self._last:
            return
        self._last = line
        if self.on_terminal:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r{line[:width]}\x1b[K")
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def in_hours(seconds: float) -> str:
    """ "1:02:03", or "2:03" below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
