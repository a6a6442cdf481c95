"""What a Triton server did between two readings of its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Statistics = Mapping[str, Mapping[str, Any]]
"""Name of a model -> Triton's own statistics of it."""

STAGES = ("queue", "compute_input", "compute_infer", "compute_output")


def work_between(before: Statistics, after: Statistics) -> dict[str, dict[str, Any]]:
    """For each model that was asked something: how often it was, and the mean time of a request in
    each stage.

    `requests` were answered, `failed` refused or cancelled, in `executions` batches; `queue_ms`,
    `compute_input_ms`, `compute_infer_ms` and `compute_output_ms` are means over the requests that
    were answered. Whatever else asked the server counts too, such as the canary of
    `regionspot-serve up`, once in ten seconds. Where a server was started anew in between, it is
    what it did since.
    """
    found = {}
    for model, now in after.items():
        then = before.get(model, {})
        if _total(now) < _total(then):
            then = {}
        if _total(now) > _total(then):
            found[model] = _difference(then, now)
    return found


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "requests": _of(now, "success", "count") - _of(then, "success", "count"),
        "failed": _of(now, "fail", "count") - _of(then, "fail", "count"),
        "executions": int(now.get("execution_count", 0)) - int(then.get("execution_count", 0)),
    }
    for stage in STAGES:
        count = _of(now, stage, "count") - _of(then, stage, "count")
        nanoseconds = _of(now, stage, "ns") - _of(then, stage, "ns")
        row[f"{stage}_ms"] = round(nanoseconds / count / 1e6, 3) if count else None
    return row


def _total(one: Mapping[str, Any]) -> int:
    return _of(one, "success", "count") + _of(one, "fail", "count")


def _of(one: Mapping[str, Any], stage: str, name: str) -> int:
    """What is zero is left out of Triton's answer, and what is not may be text."""
    return int(one.get("inference_stats", {}).get(stage, {}).get(name, 0))
