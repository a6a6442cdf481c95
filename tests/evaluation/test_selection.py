"""The best (region, class) pairs of an image."""

from __future__ import annotations

import numpy as np
import pytest

from regionspot.evaluation.selection import top_pairs

PROBABILITIES = np.array([[0.5, 0.3, 0.2], [0.1, 0.5, 0.4]])


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 900])
def test_best_first_and_ties_in_order(limit: int) -> None:
    regions, classes, scores = top_pairs(PROBABILITIES, limit=limit)
    assert regions.tolist() == [0, 1, 1, 0, 0, 1][:limit]
    assert classes.tolist() == [0, 1, 2, 1, 2, 0][:limit]
    assert scores.tolist() == [0.5, 0.5, 0.4, 0.3, 0.2, 0.1][:limit]


def test_detector_scores_order_what_probability_chose() -> None:
    regions, classes, scores = top_pairs(PROBABILITIES, np.array([1.0, 0.1]), limit=3)
    assert list(zip(regions.tolist(), classes.tolist(), strict=True)) == [(0, 0), (1, 1), (1, 2)]
    np.testing.assert_allclose(scores, [0.5, 0.05, 0.04])


def test_equals_a_full_sort_on_a_large_image() -> None:
    rng = np.random.default_rng(0)
    probabilities = np.round(rng.random((40, 100)), 2)  # many ties at the limit
    expected = np.argsort(-probabilities.ravel(), kind="stable")[:900]
    regions, classes, _ = top_pairs(probabilities)
    np.testing.assert_array_equal(regions * 100 + classes, expected)


def test_no_regions() -> None:
    regions, classes, scores = top_pairs(np.zeros((0, 3)), np.zeros(0))
    assert regions.shape == classes.shape == scores.shape == (0,)
