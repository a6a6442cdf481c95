"""From logits to scores and the best classes, the same behind every runtime."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from regionspot.arrays import as_numbers, checked_count
from regionspot.errors import InputError
from regionspot.structures import FloatArray

Scalar = TypeVar("Scalar", bound=np.generic)


def softmax(logits: FloatArray) -> FloatArray:
    """Over the last axis, in float32; as in PyTorch, NaN where a row holds NaN or inf, or nothing
    but -inf.

    Raises:
        InputError: `logits` are no numbers, or have no axis.
    """
    logits = as_numbers(logits, "logits")
    if logits.ndim == 0:
        raise InputError("logits must have at least one axis, got a single number")
    with np.errstate(invalid="ignore"):
        shifted: FloatArray = logits - logits.max(axis=-1, keepdims=True, initial=-np.inf)
        scores: FloatArray = np.exp(shifted, out=shifted)
        scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def best_reading(values: npt.NDArray[Scalar], iou_predictions: FloatArray) -> npt.NDArray[Scalar]:
    """Picks each prompt's reading with the highest predicted IoU, as SAM advises for ambiguous
    prompts.

    Args:
        values: (..., T, X), one row for each of T readings.
        iou_predictions: (..., T).

    Returns:
        (..., X).
    """
    best = iou_predictions.argmax(-1)[..., None, None]  # (..., 1, 1)
    return np.take_along_axis(values, best, axis=-2).squeeze(-2)


def best_classes(scores: FloatArray, count: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """The `count` best of (N, V) scores, best first, and their indices; of equal scores the first
    class is better.

    Returns:
        (N, K) each, K the smaller of `count` and V.

    Raises:
        InputError: `scores` are not two-dimensional, or `count` is not a whole number of 1 or more.
    """
    scores = as_numbers(scores, "scores")
    if scores.ndim != 2:
        raise InputError(f"scores must be (N, V), got the shape {scores.shape}")
    count = min(checked_count(count, "count"), scores.shape[1])
    candidates = _candidates(-scores, count)  # (N, K) in ascending order, or all classes
    of_candidates = np.take_along_axis(scores, candidates, axis=1)
    order = np.argsort(-of_candidates, axis=1, kind="stable")[:, :count]
    ids = np.take_along_axis(candidates, order, axis=1)
    return np.take_along_axis(scores, ids, axis=1), ids


def _candidates(costs: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """The `count` classes of lowest cost for each row (N, V), in ascending order; all of them where
    that is as fast.
    """
    n, v = costs.shape
    if 4 * count >= v or np.isnan(costs).any():
        return np.broadcast_to(np.arange(v, dtype=np.int64), (n, v))
    # the highest cost that still counts
    limit = np.partition(costs, count - 1, axis=1)[:, count - 1, None]
    better, tied = costs < limit, costs == limit
    first_tied = tied.cumsum(axis=1, dtype=np.int32) <= count - better.sum(axis=1, keepdims=True)
    return np.nonzero(better | (tied & first_tied))[1].reshape(n, count)
