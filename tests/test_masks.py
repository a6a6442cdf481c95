"""Run-length masks against pycocotools, byte for byte."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pycocotools import mask as coco

from regionspot.errors import InputError
from regionspot.masks import decode_rle, encode_rle, mask_to_box, rle_area
from regionspot.structures import Rle

masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=150), elements=st.booleans())


def oracle(mask: NDArray) -> dict:
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def assert_equals_oracle(mask: NDArray) -> None:
    rle = encode_rle(mask)
    assert rle == oracle(mask)
    decoded = decode_rle(rle)
    assert decoded.dtype == np.bool_ and decoded.shape == mask.shape and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, mask != 0)
    assert rle_area(rle) == int(coco.area(oracle(mask))) == int(decoded.sum())


@given(masks)
@settings(deadline=None, max_examples=200)
def test_any_mask_equals_pycocotools(mask: NDArray) -> None:
    assert_equals_oracle(mask)
    x, y, w, h = coco.toBbox(oracle(mask))
    np.testing.assert_array_equal(mask_to_box(mask), np.array([x, y, x + w, y + h], np.float32))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (37, 53), (64, 64), (65, 129), (427, 641)])
@pytest.mark.parametrize("kind", ["empty", "full", "first", "last", "blobs", "noise"])
def test_shapes_and_kinds(shape: tuple[int, int], kind: str) -> None:
    random = np.random.default_rng(0)
    mask = np.zeros(shape, dtype=bool)
    if kind == "full":
        mask[:] = True
    elif kind == "first":
        mask[0, 0] = True
    elif kind == "last":
        mask[-1, -1] = True
    elif kind == "blobs":
        y, x = np.mgrid[: shape[0], : shape[1]]
        mask = np.sin(x / 9) * np.cos(y / 7) > 0.3
    elif kind == "noise":
        mask = random.random(shape) < 0.5
    assert_equals_oracle(mask)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_no_pixels(shape: tuple[int, int]) -> None:
    assert_equals_oracle(np.zeros(shape, dtype=bool))


def test_any_memory_order_and_any_nonzero_byte() -> None:
    base = (np.random.default_rng(1).random((90, 141)) < 0.4).astype(np.uint8) * 255
    read_only = base.copy()
    read_only.flags.writeable = False
    for view in (base[::2, 1::3], base.T, base[::-1, ::-1], np.asfortranarray(base), base[5:70, 9:80], read_only):
        assert encode_rle(view) == oracle(view != 0)
        np.testing.assert_array_equal(mask_to_box(view), mask_to_box(np.ascontiguousarray(view)))


def test_decodes_what_pycocotools_hands_out() -> None:
    mask = np.eye(20, dtype=bool)
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))  # its counts are bytes
    np.testing.assert_array_equal(decode_rle(rle), mask)


def test_encodes_in_threads() -> None:
    mask = np.random.default_rng(2).random((500, 700)) < 0.5
    found: list[Rle] = []
    threads = [threading.Thread(target=lambda: found.append(encode_rle(mask))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [oracle(mask)] * 8


@pytest.mark.parametrize("mask", [np.zeros(4, bool), np.zeros((1, 4, 4), bool), np.zeros((4, 4), np.float32)])
def test_what_is_no_mask_is_refused(mask: NDArray) -> None:
    with pytest.raises(InputError, match="a mask must be"):
        encode_rle(mask)
    with pytest.raises(InputError, match="a mask must be"):
        mask_to_box(mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 3], "counts": ""}, "fewer pixels"),
        ({"size": [2, 3], "counts": "5"}, "fewer pixels"),
        ({"size": [2, 3], "counts": "7"}, "more pixels"),
        ({"size": [2, 3], "counts": "o"}, "middle of a number"),
        ({"size": [2, 3], "counts": "6\N{SNOWMAN}"}, "outside '0' to 'o'"),
        ({"size": [2**40, 2**40], "counts": "0"}, "2\\^32"),
        ({"size": [-2, 3], "counts": "6"}, "negative"),
        ({"size": [2, 3], "counts": [6]}, "compressed text, got list"),
        ({"size": [2, 3]}, '"counts"'),
        ({"size": 6, "counts": "6"}, '"counts"'),
    ],
)
def test_damaged_encodings_are_refused(rle: Any, message: str) -> None:
    for function in (decode_rle, rle_area):
        with pytest.raises(InputError, match=message):
            function(rle)


@given(st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=30), st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None)
def test_foreign_text_never_does_more_than_raise(counts: str, height: int, width: int) -> None:
    try:
        mask = decode_rle({"size": [height, width], "counts": counts})
    except InputError:
        return
    assert mask.shape == (height, width)
