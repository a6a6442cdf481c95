"""Binary masks as COCO run-length encodings, byte for byte those of the COCO API, and their boxes.

Pixel frame: row 0 is the top, column 0 the left. Runs go down the columns, as COCO's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from regionspot.errors import InputError
from regionspot.threads import default_threads

try:
    from regionspot import _native
except ImportError as error:
    raise ImportError(
        "regionspot's native extension is not built; build it with `make setup` (a checkout) or `pip install .`"
    ) from error

if TYPE_CHECKING:
    from regionspot.structures import Rle


def encode_rle(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> Rle:
    """Encode a mask.

    Args:
        mask: (H, W) bool or uint8, any memory order; every non-zero pixel is foreground.

    Returns:
        {"size": [H, W], "counts": COCO's compressed runs}.

    Raises:
        InputError: not two-dimensional, or of another dtype (a float mask must be thresholded first).
    """
    return {"size": [int(side) for side in mask.shape], "counts": _native.rle_encode(_as_bytes(mask))}


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
    """SAM's masks at the picture's size, straight from its low-resolution logits; no mask is ever held.

    The pixels are those of `segment_anything`'s `Sam.postprocess_masks` and its threshold: logits enlarged bilinearly
    to the SAM frame, its padding cut off, resized once more to the picture, foreground where above 0. They are equal to
    the last bit where PyTorch's CPU kernels use fused multiply-adds, which is on every x86-64 processor with AVX2.

    Args:
        low_res_masks: (n, m, m) float32 logits.
        frame: side of the square SAM frame.
        valid: (height, width) of what is not padding there.
        picture: (height, width) of the masks.
        threads: at most so many; None stands for `default_threads()`.

    Raises:
        InputError: not three-dimensional, of another dtype, or a size that is not positive or not in the frame.
    """
    if low_res_masks.ndim != 3 or low_res_masks.dtype != np.float32 or 0 in low_res_masks.shape[1:]:
        raise InputError(f"mask logits must be (n, m, m) float32, got {low_res_masks.shape} {low_res_masks.dtype}")
    if not all(0 < side <= frame for side in valid) or min(picture) < 1:
        raise InputError(f"a picture of {picture} that takes {valid} of a frame of {frame} pixels is impossible")
    logits = np.ascontiguousarray(low_res_masks)
    counts, areas, boxes = _native.masks_from_logits(logits, frame, valid, picture, threads or default_threads())
    return EncodedMasks(
        tuple({"size": list(picture), "counts": text} for text in counts),
        np.array(areas, np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
    )


def decode_rle(rle: Rle) -> NDArray[np.bool_]:
    """Decode to an (H, W) bool mask, C-contiguous.

    Raises:
        InputError: the encoding is damaged, or does not fill exactly the size that it names.
    """
    counts, height, width = _parts(rle)
    try:
        return np.ascontiguousarray(_native.rle_decode(counts, height, width))
    except ValueError as error:
        raise _damaged(height, width, error) from error


def rle_area(rle: Rle) -> int:
    """Number of foreground pixels, without decoding the mask.

    Raises:
        InputError: as `decode_rle`.
    """
    counts, height, width = _parts(rle)
    try:
        return _native.rle_area(counts, height, width)
    except ValueError as error:
        raise _damaged(height, width, error) from error


def mask_to_box(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> NDArray[np.float32]:
    """The smallest box around the foreground.

    Args:
        mask: (H, W) bool or uint8.

    Returns:
        (4,) float32 xyxy in the mask's pixels, x1 and y1 exclusive; all zeros where the mask is empty.

    Raises:
        InputError: as `encode_rle`.
    """
    pixels = _as_bytes(mask)
    rows = np.flatnonzero(pixels.any(axis=1))
    if rows.size == 0:
        return np.zeros(4, dtype=np.float32)
    columns = np.flatnonzero(pixels.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)


def _as_bytes(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    if mask.ndim != 2:
        raise InputError(f"a mask must be (height, width), got the shape {mask.shape}")
    if mask.dtype not in (np.bool_, np.uint8):
        raise InputError(f"a mask must be bool or uint8, got {mask.dtype}; threshold it first (mask > 0)")
    return mask.view(np.uint8)


def _parts(rle: Rle) -> tuple[str, int, int]:
    try:
        counts, (height, width) = rle["counts"], rle["size"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError('an RLE mask must be {"size": [height, width], "counts": text}') from error
    if isinstance(counts, bytes):  # as the COCO API hands it out
        counts = counts.decode("ascii", errors="replace")
    if not isinstance(counts, str):
        raise InputError(f"an RLE mask's counts must be COCO's compressed text, got {type(counts).__name__}")
    if height < 0 or width < 0:
        raise InputError(f"an RLE mask's size must not be negative, got [{height}, {width}]")
    return counts, int(height), int(width)


def _damaged(height: int, width: int, error: ValueError) -> InputError:
    return InputError(f"damaged RLE mask of size [{height}, {width}]: {error}")
