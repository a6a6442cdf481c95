"""Softmax and the best classes, held against PyTorch's."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from regionspot.errors import InputError
from regionspot.runtime.scores import best_classes, best_reading, softmax


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 11), (0, 4), (2, 0, 4), (3, 1)])
def test_softmax_is_pytorchs(shape: tuple[int, ...]) -> None:
    logits = 30 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    before = logits.copy()
    scores = softmax(logits)
    assert scores.dtype == np.float32 and scores.shape == shape
    np.testing.assert_allclose(scores, torch.from_numpy(logits).softmax(-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(logits, before)


def test_large_logits_do_not_overflow() -> None:
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4, -1e4]], np.float32)), [[0.5, 0.5, 0]])


def test_nan_stays_nan() -> None:
    assert np.isnan(softmax(np.array([[np.nan, 1.0]], np.float32))).all()


def test_best_first_and_of_equals_the_first() -> None:
    scores, ids = best_classes(
        np.array([[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25]], np.float32), 3
    )
    assert ids.tolist() == [[1, 3, 0], [0, 1, 2]]
    np.testing.assert_allclose(scores, [[0.4, 0.4, 0.1], [0.25, 0.25, 0.25]])
    assert scores.dtype == np.float32 and ids.dtype == np.int64


def test_no_more_than_there_are() -> None:
    scores, ids = best_classes(np.zeros((0, 3), np.float32), 9)
    assert scores.shape == ids.shape == (0, 3)


def test_the_reading_with_the_highest_predicted_iou_is_taken() -> None:
    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    ious = np.array([[0.1, 0.9, 0.2], [0.5, 0.4, 0.3]], np.float32)
    assert best_reading(values, ious).tolist() == [values[0, 1].tolist(), values[1, 0].tolist()]


@pytest.mark.parametrize("values", ["few", "many", "nan", "inf", "zeros"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 7), (3, 60), (50, 500), (0, 60), (2, 0)])
def test_any_count_equals_a_full_sort(shape: tuple[int, int], values: str) -> None:
    rng = np.random.default_rng(0)
    scores = (
        rng.integers(0, 4, shape).astype(np.float32)
        if values == "few"
        else rng.random(shape, np.float32)
    )
    odd = {"nan": np.nan, "inf": np.inf, "zeros": -0.0}.get(values)
    if odd is not None:
        scores[rng.random(shape) < 0.3] = odd
        scores[rng.random(shape) < 0.2] = 0.0
    order = np.argsort(-scores, axis=1, kind="stable")
    for count in (1, 2, 5, 30, 1000):
        best, ids = best_classes(scores, count)
        np.testing.assert_array_equal(ids, order[:, :count])
        np.testing.assert_array_equal(best, np.take_along_axis(scores, order[:, :count], axis=1))


def test_odd_logits_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert softmax(np.zeros((2, 0), np.float32)).shape == (2, 0)
        odd = np.array([[np.inf, 1], [-np.inf, -np.inf], [np.nan, 0], [-np.inf, 3]], np.float32)
        np.testing.assert_array_equal(softmax(odd), torch.from_numpy(odd).softmax(-1))
    assert softmax([[1, 1]]).dtype == np.float32  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1.5, "2", None, True])
def test_what_is_no_count(count: Any) -> None:
    with pytest.raises(InputError, match="count must be a whole number"):
        best_classes(np.zeros((1, 3), np.float32), count)


@pytest.mark.parametrize("scores", [[1.0], 5, [["a"]], None, np.zeros((1, 2, 3))])
def test_what_is_no_table_of_scores(scores: Any) -> None:
    with pytest.raises(InputError, match="scores must be"):
        best_classes(scores, 1)
