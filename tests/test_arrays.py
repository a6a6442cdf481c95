"""What callers pass in becomes arrays and plain numbers, or one clear line: never something else in
silence.
"""

from __future__ import annotations

import os
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from regionspot.arrays import as_numbers, as_whole_numbers, checked_count, whole_number
from regionspot.errors import InputError, plain_text, shown

ROW = [1.0, 2.0, 3.5, 4.0]


@pytest.mark.parametrize(
    "values",
    [
        [ROW],
        (tuple(ROW),),
        np.array([ROW]),
        np.array([ROW], np.float16),
        np.array([ROW], object),
        np.ma.array([ROW]),
        np.array([ROW], ">f8"),
        [[Decimal("1"), Fraction(2), 3.5, np.int8(4)]],
        torch.tensor([ROW], requires_grad=True),
        torch.tensor([ROW], dtype=torch.bfloat16),
        torch.tensor([ROW], dtype=torch.float16),
        torch.nn.Parameter(torch.tensor([ROW])),
        [torch.tensor(ROW, requires_grad=True)],
        [[torch.tensor(1.0, requires_grad=True), 2, 3.5, 4]],
    ],
)
def test_numbers(values: Any) -> None:
    array = as_numbers(values, "boxes")
    assert type(array) is np.ndarray and array.dtype == np.float32
    np.testing.assert_array_equal(array, [ROW])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([["1", "2", "3", "4"]], r"numbers, not of text \('1'\)"),
        (np.array([["1"]], object), r"not of str \('1'\)"),
        ("1234", "not of text"),
        ([[b"1"]], "not of bytes"),
        ([[None, 1]], r"not of NoneType \(None\)"),
        ([[True, False]], r"not of booleans \(True\)"),
        ([[1j, 2]], "not of complex"),
        (np.array([1], "M8[s]"), "not of dates"),
        (np.zeros(2, [("x", int)]), "not of records"),
        ([[10**400]], "too large"),
        ([[1, 2], [1]], "rectangular"),
        (np.ma.array([1, 2], mask=[False, True]), "masked elements"),
        ((value for value in ROW), "not a generator: make a list of it"),
        (iter(ROW), "make a list of it"),
        ({0: 1}, "not a dict"),
        ({1, 2}, "not a set"),
        (None, "not a NoneType"),
        (object(), "not of object"),
        (torch.ones(2).to_sparse(), "Sparse"),
        (torch.ones(2, dtype=torch.complex64), "not of complex"),
        (torch.ones(2, device="meta"), "meta"),
    ],
)
def test_what_is_no_number_is_refused(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^boxes must .*{message}"):
        as_numbers(values, "boxes")


def test_whole_numbers() -> None:
    assert as_whole_numbers([[1.0, -1]], "labels").dtype == np.int32
    assert as_whole_numbers([True, False], "labels", booleans=True).tolist() == [1, 0]
    for wrong in ([1.5], [float("nan")], [float("inf")], [2**40]):
        with pytest.raises(InputError, match="labels must be whole numbers, got"):
            as_whole_numbers(wrong, "labels")


@pytest.mark.parametrize(
    "value", [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), torch.tensor(3)]
)
def test_counts(value: Any) -> None:
    count = checked_count(value, "top_k")
    assert count == 3 and type(count) is int


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        1.5,
        True,
        np.True_,
        "3",
        None,
        [3],
        float("nan"),
        float("inf"),
        10**30,
        [10**5000],
        torch.ones(2),
    ],
)
def test_what_is_no_count(value: Any) -> None:
    with pytest.raises(
        InputError, match=r"top_k must be a whole number, 1 or more, got ."
    ) as error:
        checked_count(value, "top_k")
    assert len(str(error.value)) < 200


def test_whole_number() -> None:
    assert whole_number(2**70) == 2**70 and whole_number(-1.0) == -1
    assert whole_number(True) is None and whole_number("1") is None


def test_texts_for_messages() -> None:
    assert shown("x" * 1000) == f"'{'x' * 29}...{'x' * 29}'"
    assert plain_text("naïve 犬") == "naïve 犬"
    assert plain_text("caf\udce9.jpg") == "caf\\xe9.jpg"  # a byte of a file's name
    assert plain_text("\ud800犬") == "\\ud800犬"
    assert plain_text(os.fsdecode(b"caf\xe9.jpg")) == "caf\\xe9.jpg"
    assert plain_text("café.jpg") == "café.jpg"
    assert plain_text("\ud800") == "\\ud800"
