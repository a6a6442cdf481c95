"""From logits to scores and the best classes, the same behind every runtime."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from regionspot.structures import FloatArray


def softmax(logits: FloatArray) -> FloatArray:
    """Over the last axis, in float32."""
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True, initial=-np.inf)
    scores: FloatArray = np.exp(shifted, out=shifted)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def best_classes(scores: FloatArray, count: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """The `count` best of (N, V) scores, best first, and their indices; of equal scores the first class is better.

    Returns:
        (N, K) each, K the smaller of `count` and V.
    """
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
    return np.take_along_axis(scores, ids, axis=-1), ids
