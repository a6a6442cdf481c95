"""Which (region, class) pairs of an image become detections."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PAIRS_PER_IMAGE = 900


def top_pairs(
    probabilities: npt.NDArray[np.floating],
    detector_scores: npt.NDArray[np.floating] | None = None,
    limit: int = PAIRS_PER_IMAGE,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The best pairs of one image: one region may carry several labels, as in the authors'
    protocol.

    Pairs are chosen by class probability alone; a detector's scores then multiply it and decide the
    order.

    Args:
        probabilities: (N, V) of each region over the classes.
        detector_scores: (N,) of each region, or None.
        limit: how many pairs at most.

    Returns:
        Region indices, class indices and scores, (K,) each with K = min(limit, N·V), best first;
        equals keep the order of regions, then of classes.
    """
    flat = probabilities.astype(np.float64).ravel()  # (N·V,)
    chosen = np.arange(flat.size)
    if flat.size > limit:
        weakest = np.partition(flat, flat.size - limit)[flat.size - limit]
        chosen = np.flatnonzero(flat >= weakest)
    chosen = chosen[np.argsort(-flat[chosen], kind="stable")][:limit]
    regions, classes = np.divmod(chosen, probabilities.shape[1])
    scores = flat[chosen]
    if detector_scores is not None:
        scores = scores * detector_scores[regions]
        order = np.argsort(-scores, kind="stable")
        regions, classes, scores = regions[order], classes[order], scores[order]
    return regions, classes, scores


def best_labels(
    probabilities: npt.NDArray[np.floating],
    words: npt.NDArray[np.int64],
    detector_scores: npt.NDArray[np.floating] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """As `top_pairs`, with each region's best word alone, of equals the first.

    Args:
        probabilities: (N, words).
        words: (V,) the word of each class; classes that share the best word are all detections.
        detector_scores: (N,) or None.
    """
    best = probabilities.argmax(1)  # (N,)
    regions, classes = np.nonzero(best[:, None] == words)
    scores = probabilities.max(1).astype(np.float64) * (
        1.0 if detector_scores is None else detector_scores
    )
    order = np.argsort(-scores[regions], kind="stable")
    return regions[order], classes[order], scores[regions[order]]
