"""Binary masks as COCO run-length encodings, byte for byte those of the COCO API, and their boxes.

Pixel frame: row 0 is the top, column 0 the left. Runs go down the columns, as COCO's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from regionspot.arrays import as_array, checked_count, whole_number
from regionspot.errors import InputError, shown
from regionspot.threads import default_threads

try:
    from regionspot import _native
except ImportError as error:
    raise ImportError(
        "regionspot's native extension is not built; build it with `make setup` (a checkout) or "
        "`pip install .`"
    ) from error

MAX_DECODED_PIXELS = 2**30
"""Larger masks are not decoded: a few bytes of text can stand for any number of pixels."""

_MAX_PIXELS = 2**32 - 1  # the COCO API keeps runs in 32 bits
_MAX_FRAME = 2**20


class Rle(TypedDict):
    """A binary mask as COCO's compressed run lengths: `size` is `[height, width]`, `counts` the
    ASCII string.
    """

    size: list[int]
    counts: str


def encode_rle(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> Rle:
    """Encode a mask.

    Args:
        mask: (H, W) bool or uint8, an array or nested lists, any memory order; every non-zero pixel
            is foreground.

    Returns:
        {"size": [H, W], "counts": COCO's compressed runs}.

    Raises:
        InputError: not two-dimensional, or of another dtype (a float mask must be thresholded
            first).
    """
    pixels = _as_bytes(mask)
    if pixels.size > _MAX_PIXELS:
        raise InputError(f"a mask must have fewer than 2^32 pixels, got the shape {pixels.shape}")
    return {"size": list(pixels.shape), "counts": _native.rle_encode(pixels)}


@dataclass(frozen=True, eq=False)
class EncodedMasks:
    """n masks of one picture, and what is known of them without decoding one."""

    rles: tuple[Rle, ...]
    areas: NDArray[np.int64]
    """(n,) pixels of foreground."""

    boxes: NDArray[np.float32]
    """(n, 4) as `mask_to_box`."""


def encode_mask_logits(
    low_res_masks: NDArray[np.float32],
    frame: int,
    valid: tuple[int, int],
    picture: tuple[int, int],
    threads: int | None = None,
) -> EncodedMasks:
    """SAM's masks at the picture's size, straight from its low-resolution logits; no mask is ever
    held.

    The pixels are those of `segment_anything`'s `Sam.postprocess_masks` and its threshold: logits
    enlarged bilinearly to the SAM frame, its padding cut off, resized once more to the picture,
    foreground where above 0. They are equal to the last bit where PyTorch's CPU kernels use fused
    multiply-adds, which is on every x86-64 processor with AVX2.

    Args:
        low_res_masks: (n, m, m) float32 logits.
        frame: side of the square SAM frame.
        valid: (height, width) of what is not padding there.
        picture: (height, width) of the masks.
        threads: at most so many; None stands for `default_threads()`.

    Raises:
        InputError: not three-dimensional, of another dtype, or a size that is not positive or not
            in the frame.
    """
    logits = as_array(low_res_masks, "mask logits")
    if logits.ndim != 3 or logits.dtype != np.float32 or 0 in logits.shape[1:]:
        raise InputError(
            f"mask logits must be (n, m, m) float32, got {logits.shape} {logits.dtype}"
        )
    frame = checked_count(frame, "frame")
    valid = _size(valid, "valid")
    picture = _size(picture, "picture")
    if max(valid) > frame or frame > _MAX_FRAME or picture[0] * picture[1] > _MAX_PIXELS:
        raise InputError(
            f"a picture of {picture} that takes {valid} of a frame of {frame} pixels is impossible"
        )
    threads = default_threads() if threads is None else checked_count(threads, "threads")
    counts, areas, boxes = _native.masks_from_logits(
        np.ascontiguousarray(logits), frame, valid, picture, threads
    )
    return EncodedMasks(
        tuple({"size": list(picture), "counts": text} for text in counts),
        np.array(areas, np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
    )


def decode_rle(rle: Rle) -> NDArray[np.bool_]:
    """Decode to an (H, W) bool mask, C-contiguous.

    Raises:
        InputError: the encoding is damaged, does not fill exactly the size that it names, or is
            larger than MAX_DECODED_PIXELS.
    """
    rle = checked_rle(rle)
    height, width = rle["size"]
    if height * width > MAX_DECODED_PIXELS:
        raise InputError(
            f"an RLE mask of size [{height}, {width}] is too large to decode: resize it first"
        )
    try:
        return np.ascontiguousarray(_native.rle_decode(rle["counts"], height, width))
    except ValueError as error:
        raise _damaged(height, width, error) from error


def rle_area(rle: Rle) -> int:
    """Number of foreground pixels, without decoding the mask.

    Raises:
        InputError: as `decode_rle`, but for the size.
    """
    rle = checked_rle(rle)
    height, width = rle["size"]
    try:
        return _native.rle_area(rle["counts"], height, width)
    except ValueError as error:
        raise _damaged(height, width, error) from error


def checked_rle(rle: Any) -> Rle:
    """An encoded mask with plain types: counts that are bytes, as the COCO API's, become text,
    sizes `int`.

    Raises:
        InputError: it has another form, or its size is not two whole numbers. The runs themselves
            are not read.
    """
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise InputError(
            f'an RLE mask must be {{"size": [height, width], "counts": text}}, got {shown(rle)}'
        )
    counts, size = rle["counts"], rle["size"]
    if isinstance(counts, (bytes, bytearray)):
        counts = counts.decode("ascii", errors="replace")
    if not isinstance(counts, str):
        raise InputError(
            f"an RLE mask's counts must be COCO's compressed text, got {type(counts).__name__}"
        )
    height, width = _size(size, "an RLE mask's size", least=0)
    if max(height, width, height * width) > _MAX_PIXELS:
        raise _damaged(height, width, "the size has more than 2^32 - 1 pixels")
    if not counts.isascii():
        raise _damaged(height, width, "the text holds a character outside '0' to 'o'")
    return {"size": [height, width], "counts": str(counts)}


def mask_to_box(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> NDArray[np.float32]:
    """The smallest box around the foreground.

    Args:
        mask: (H, W) bool or uint8.

    Returns:
        (4,) float32 xyxy in the mask's pixels, x1 and y1 exclusive; all zeros where the mask is
        empty.

    Raises:
        InputError: as `encode_rle`.
    """
    pixels = _as_bytes(mask)
    rows = np.flatnonzero(pixels.any(axis=1))
    if rows.size == 0:
        return np.zeros(4, dtype=np.float32)
    columns = np.flatnonzero(pixels.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)


def _as_bytes(mask: Any) -> NDArray[np.uint8]:
    pixels = as_array(mask, "a mask")
    if pixels.ndim != 2:
        raise InputError(f"a mask must be (height, width), got the shape {pixels.shape}")
    if pixels.dtype not in (np.bool_, np.uint8):
        raise InputError(
            f"a mask must be bool or uint8, got {pixels.dtype}; threshold it first (mask > 0)"
        )
    return pixels.view(np.uint8)


def _size(size: Any, name: str, least: int = 1) -> tuple[int, int]:
    try:
        sides = [whole_number(side) for side in size]
    except TypeError:
        sides = []
    if len(sides) != 2 or any(side is None for side in sides):
        raise InputError(f"{name} must be two whole numbers, [height, width], got {shown(size)}")
    height, width = (side for side in sides if side is not None)
    if min(height, width) < least:
        raise InputError(
            f"{name} must not be negative{' or zero' if least else ''}, got [{height}, {width}]"
        )
    return height, width


def _damaged(height: int, width: int, error: Exception | str) -> InputError:
    return InputError(f"damaged RLE mask of size [{height}, {width}]: {error}")
