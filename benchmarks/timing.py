"""Run something until its time is known well enough."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

ENOUGH_S = 3.0
MAX_REPETITIONS = 20


def repeat(run: Callable[[], object], at_least: int = 3) -> list[float]:
    """Seconds of each repetition: `at_least` so many, and more until ENOUGH_S have passed. The caller warms up."""
    seconds: list[float] = []
    while len(seconds) < at_least or (sum(seconds) < ENOUGH_S and len(seconds) < MAX_REPETITIONS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)
