"""Run something until its time is known well enough."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ENOUGH_S = 3.0
MAX_REPETITIONS = 20

Clock = Callable[[Callable[[], object]], float]
"""Runs something once; the seconds that it took."""


def wall_clock(run: Callable[[], object]) -> float:
    """Of work that has ended when `run` returns: all of a CPU's, and whatever gives its results as
    arrays.
    """
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def cuda_clock(run: Callable[[], object]) -> float:
    """By events on the current CUDA stream, which see the GPU's own time and wait for its end."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000


def repeat(
    run: Callable[[], object],
    at_least: int = 3,
    enough_s: float = ENOUGH_S,
    at_most: int = MAX_REPETITIONS,
    clock: Clock = wall_clock,
) -> list[float]:
    """Seconds of each repetition: `at_least` so many, and more until `enough_s` have passed. The
    caller warms up.
    """
    seconds: list[float] = []
    while len(seconds) < at_least or (sum(seconds) < enough_s and len(seconds) < at_most):
        seconds.append(clock(run))
    return seconds


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def percentiles(seconds: Sequence[float]) -> dict[str, Any]:
    """`n`, and `p50_ms`, `p90_ms` and `p99_ms`; with few repetitions the last two are near the
    slowest.
    """
    milliseconds = 1000 * np.array(seconds)
    found = {f"p{q}_ms": float(np.percentile(milliseconds, q)) for q in (50, 90, 99)}
    return {"n": len(seconds), **found}
