"""Differences as numbers, and which of them a class of parity lets pass."""

from __future__ import annotations

import numpy as np
import pytest

from regionspot.errors import InputError
from regionspot.runtime.formats import FORMATS
from regionspot.runtime.tolerance import (
    FP8,
    HALF,
    INT8,
    RUNTIME_FP32,
    SQNR_CAP_DB,
    TENSORRT_FP32,
    Difference,
    measure,
    worst,
)


def test_known_numbers() -> None:
    reference = np.array([3.0, 4.0], np.float32)
    difference = measure(reference, np.array([3.0, 4.5], np.float32))
    assert difference.max_abs_diff == 0.5 and difference.max_abs_reference == 4.0
    assert difference.relative == 0.125
    assert difference.cosine == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))
    assert difference.sqnr_db == pytest.approx(20.0)  # 25 over 0.25


@pytest.mark.parametrize(
    "array", [np.zeros((0, 3), np.float32), np.zeros(4, np.float32), np.ones(4, np.float32)]
)
def test_equal_arrays_have_no_difference(array: np.ndarray) -> None:
    difference = measure(array, array.copy())
    assert (difference.max_abs_diff, difference.cosine, difference.sqnr_db) == (
        0.0,
        1.0,
        SQNR_CAP_DB,
    )


def test_zeros_against_numbers_are_as_different_as_can_be() -> None:
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert measure(zeros, ones).cosine == measure(ones, zeros).cosine == 0.0
    assert measure(zeros, ones).sqnr_db == -SQNR_CAP_DB and measure(ones, zeros).sqnr_db == 0.0


def test_small_values_are_judged_by_their_absolute_difference() -> None:
    assert Difference(5e-5, 0.01, 1.0, 60.0).relative == 5e-5


def test_worst_takes_the_worst_of_each() -> None:
    assert worst([Difference(1.0, 2.0, 0.5, 40.0), Difference(0.1, 9.0, 0.9, 3.0)]) == Difference(
        1.0, 9.0, 0.5, 3.0
    )


@pytest.mark.parametrize(
    ("artefact_format", "precision", "tolerance"),
    [
        ("onnx", "fp32", RUNTIME_FP32),
        ("openvino", "fp32", RUNTIME_FP32),
        ("tensorrt", "fp32", TENSORRT_FP32),
        ("tensorrt-rtx", "fp32", TENSORRT_FP32),
        ("onnx", "fp16", HALF),
        ("tensorrt", "bf16", HALF),
        ("openvino", "int8", INT8),
        ("tensorrt-rtx", "fp8", FP8),
    ],
)
def test_classes(artefact_format: str, precision: str, tolerance: object) -> None:
    assert FORMATS[artefact_format].tolerance(precision) is tolerance


def test_unknown_precision() -> None:
    with pytest.raises(InputError, match="'fp4'"):
        FORMATS["onnx"].tolerance("fp4")


def test_breaches_name_the_figure_and_the_limit() -> None:
    assert RUNTIME_FP32.breaches(Difference(1e-4, 1.0, 1.0, 80.0)) == []
    assert RUNTIME_FP32.breaches(Difference(1e-3, 10.0, 1.0, 80.0)) == []
    assert RUNTIME_FP32.breaches(Difference(2e-4, 1.0, 1.0, 80.0)) == [
        "max|Δ| 0.0002 is 0.0002 > 0.0001"
    ]
    assert HALF.breaches(Difference(9.0, 1.0, 0.9989, 24.9)) == [
        "cosine 0.99890 < 0.999",
        "SQNR 24.9 dB < 25 dB",
    ]
    assert HALF.breaches(Difference(np.nan, 1.0, np.nan, np.nan)) != []
    assert INT8.end_to_end_breaches(0.9, 0.5) == []
    assert RUNTIME_FP32.end_to_end_breaches(0.99, 2e-3) == [
        "top-1 agreement 0.9900 < 1",
        "score difference 0.002 > 0.001",
    ]
