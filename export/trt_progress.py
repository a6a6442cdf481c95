"""TensorRT's progress while it builds, shown as one line."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from regionspot.progress import Progress

PERCENT = 100


@dataclass
class Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """TensorRT's phases, which nest: a step of one is often a phase of its own. Phases may begin in
    several threads.
    """

    def __init__(self) -> None:
        self._running: dict[str, Phase] = {}
        self._lock = threading.Lock()
        self._fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._running[name] = Phase(parent, max(steps, 1))

    def complete(self, name: str, step: int) -> None:
        with self._lock:
            if name in self._running:
                self._running[name].done = step + 1

    def finish(self, name: str) -> None:
        with self._lock:
            if (phase := self._running.pop(name, None)) and phase.parent is None:
                self._fraction = 1.0

    @property
    def fraction(self) -> float:
        """How much of the outermost phase is done, 0 to 1; never less than it was."""
        with self._lock:
            outermost = [name for name, phase in self._running.items() if phase.parent is None]
            self._fraction = max([self._fraction, *(self._fraction_of(name) for name in outermost)])
            return self._fraction

    def _fraction_of(self, name: str) -> float:
        phase = self._running[name]
        inside = [
            self._fraction_of(child)
            for child, other in self._running.items()
            if other.parent == name
        ]
        return min((phase.done + max(inside, default=0.0)) / phase.steps, 1.0)


def monitor_of(trt: Any, progress: Progress) -> Any:
    """A `trt.IProgressMonitor` that updates `progress`, of `PERCENT`.

    An exception must not reach TensorRT, which would end the process: Ctrl-C, or a stream that is
    closed, cancels the build and stands in `stopped_by`.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.phases = Phases()
            self.stopped_by: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)
            self._show(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.complete(phase_name, step)
            self._show(phase_name)
            return self.stopped_by is None

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)
            self._show(phase_name)

        def _show(self, phase_name: str) -> None:
            try:
                progress.update(int(self.phases.fraction * PERCENT), phase_name)
            except BaseException as error:
                self.stopped_by = self.stopped_by or error

    return Monitor()
