"""From logits to scores and the best classes, the same behind every runtime."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from regionspot.structures import FloatArray

Scalar = TypeVar("Scalar", bound=np.generic)


def softmax(logits: FloatArray) -> FloatArray:
    """Over the last axis, in float32."""
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True, initial=-np.inf)
    scores: FloatArray = np.exp(shifted, out=shifted)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def best_reading(values: npt.NDArray[Scalar], iou_predictions: FloatArray) -> npt.NDArray[Scalar]:
    """Picks each prompt's reading with the highest predicted IoU, as SAM advises for ambiguous prompts.

    Args:
        values: (..., T, X), one row for each of T readings.
        iou_predictions: (..., T).

    Returns:
        (..., X).
    """
    best = iou_predictions.argmax(-1)[..., None, None]  # (..., 1, 1)
    return np.take_along_axis(values, best, axis=-2).squeeze(-2)


def best_classes(scores: FloatArray, count: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """The `count` best of (N, V) scores, best first, and their indices; of equal scores the first class is better.

    Returns:
        (N, K) each, K the smaller of `count` and V.
    """
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
    return np.take_along_axis(scores, ids, axis=-1), ids
