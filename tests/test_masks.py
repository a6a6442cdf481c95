"""Run-length masks against pycocotools, byte for byte."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pycocotools import mask as coco

from regionspot.errors import InputError
from regionspot.masks import Rle, decode_rle, encode_mask_logits, encode_rle, mask_to_box, rle_area

masks = hnp.arrays(
    np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=150), elements=st.booleans()
)


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


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (7, 1), (37, 53), (64, 64), (65, 129), (427, 641)]
)
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
    for view in (
        base[::2, 1::3],
        base.T,
        base[::-1, ::-1],
        np.asfortranarray(base),
        base[5:70, 9:80],
        read_only,
    ):
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


def test_a_few_bytes_never_fill_the_memory() -> None:
    text = coco.frPyObjects(
        {"size": [2**16 - 1, 2**16 - 1], "counts": [(2**16 - 1) ** 2]}, 2**16 - 1, 2**16 - 1
    )
    assert rle_area(text) == 0
    with pytest.raises(InputError, match="too large to decode"):
        decode_rle(text)


def test_sizes_of_any_type() -> None:
    for size in ([2.0, 3.0], (np.int64(2), np.uint8(3)), np.array([2, 3])):
        assert decode_rle({"size": size, "counts": "6"}).shape == (2, 3)  # type: ignore[typeddict-item]


def test_masks_of_lists_and_tensors() -> None:
    assert encode_rle([[True, False]]) == oracle(np.array([[1, 0]]))  # type: ignore[arg-type]
    assert encode_rle(torch.tensor([[1, 0]], dtype=torch.uint8)) == oracle(np.array([[1, 0]]))  # type: ignore[arg-type]
    np.testing.assert_array_equal(mask_to_box([[False, True]]), [1, 0, 2, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_res_masks": [[[0.0]]]}, "float32"),
        ({"low_res_masks": None}, "mask logits"),
        ({"frame": "256"}, "frame must be a whole number"),
        ({"frame": 2**40}, "impossible"),
        ({"valid": (64,)}, "valid must be two whole numbers"),
        ({"valid": None}, "valid must be two whole numbers"),
        ({"picture": (9.5, 9)}, "picture must be two whole numbers"),
        ({"picture": (2**20, 2**20)}, "impossible"),
        ({"threads": -1}, "threads must be a whole number"),
    ],
)
def test_what_cannot_be_drawn(change: dict[str, Any], message: str) -> None:
    asked = {
        "low_res_masks": np.zeros((1, 8, 8), np.float32),
        "frame": 32,
        "valid": (32, 32),
        "picture": (9, 9),
    }
    assert encode_mask_logits(**asked).areas.tolist() == [0]  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        encode_mask_logits(**asked | change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros(4, bool),
        np.zeros((1, 4, 4), bool),
        np.zeros((4, 4), np.float32),
        [[0, 1]],
        [[True], [True, False]],
        [["a"]],
        None,
        "mask",
        np.ma.array([[True, False]], mask=[[True, False]]),
    ],
)
def test_what_is_no_mask_is_refused(mask: NDArray) -> None:
    with pytest.raises(InputError, match="a mask must"):
        encode_rle(mask)
    with pytest.raises(InputError, match="a mask must"):
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
        ({"size": 6, "counts": "6"}, "two whole numbers"),
        ({"size": [6], "counts": "6"}, "two whole numbers"),
        ({"size": ["a", "b"], "counts": "0"}, "two whole numbers"),
        ({"size": [None, 1], "counts": "0"}, "two whole numbers"),
        ({"size": [1.5, 4], "counts": "6"}, "two whole numbers"),
        ({"size": [float("nan"), 1], "counts": "0"}, "two whole numbers"),
        ({"size": [True, 6], "counts": "6"}, "two whole numbers"),
        ({"size": [1e30, 1], "counts": "0"}, "2\\^32"),
        ({"size": [0, 10**30], "counts": "0"}, "2\\^32"),
        ({"size": [2, 3], "counts": "6\ud800"}, "outside '0' to 'o'"),
        ({"size": [2, 3], "counts": b"6\xff"}, "outside '0' to 'o'"),
        ({"size": [2, 3], "counts": None}, "compressed text, got NoneType"),
        (["6", [2, 3]], '"counts"'),
        ("6", '"counts"'),
        (None, '"counts"'),
    ],
)
def test_damaged_encodings_are_refused(rle: Any, message: str) -> None:
    for function in (decode_rle, rle_area):
        with pytest.raises(InputError, match=message):
            function(rle)


@given(
    st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=30),
    st.integers(0, 40),
    st.integers(0, 40),
)
@settings(deadline=None)
def test_foreign_text_never_does_more_than_raise(counts: str, height: int, width: int) -> None:
    try:
        mask = decode_rle({"size": [height, width], "counts": counts})
    except InputError:
        return
    assert mask.shape == (height, width)
