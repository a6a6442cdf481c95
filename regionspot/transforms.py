"""The only code that resizes or flips an image, or moves coordinates from one frame to another.

Every resize of pixels is Pillow's antialiased bilinear on uint8. It is what SAM's own preprocessing
does (`segment_anything.utils.transforms.ResizeLongestSide` through Pillow); for CLIP, which the
authors resize in two ways, it is our choice, and the same in training, evaluation, every runtime
and the server. Colours are resized by the native extension, which gives Pillow's numbers much
sooner and both encoders' pictures from one reading of the pixels.

Frames: original-image pixels are the public one; the SAM frame is the image resized to a longest
side of S, at the top left of an S x S square. Normalisation is not here: it belongs to the models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from regionspot.arrays import as_array, as_numbers, checked_count
from regionspot.errors import InputError
from regionspot.masks import EncodedMasks, _native, encode_mask_logits
from regionspot.structures import BoolArray, FloatArray, UInt8Array
from regionspot.threads import default_threads

RESIZE = "Pillow bilinear on uint8, antialiased"
"""What `resize_image` does, in words: caches and artefacts that were made with another resize are
not used.

The words stay as long as the numbers are Pillow's, whoever computes them: tests/test_transforms.py
compares every byte.
"""

MASK_PROMPT_EPSILON = 1e-3
"""A mask prompt's certainty: its logits are those of the probabilities 0.001 and 0.999."""


def resize_image(
    image: UInt8Array, height: int, width: int, threads: int | None = None
) -> UInt8Array:
    """(H, W, 3) or (H, W) to height x width by Pillow's antialiased bilinear: the one definition of
    a resize.

    Args:
        threads: at most so many, of those a small image uses fewer; None stands for
            `default_threads()`.

    Raises:
        InputError: another type or shape, no pixels, or a size that is not two whole numbers of 1
            or more.
    """
    image = as_array(image, "an image")
    if (
        image.dtype != np.uint8
        or image.ndim not in (2, 3)
        or image.shape[2:] not in ((), (3,))
        or image.size == 0
    ):
        raise InputError(
            f"an image must be (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype}"
        )
    height, width = checked_count(height, "height"), checked_count(width, "width")
    if height * width > 2**31:
        raise InputError(f"an image of {width} x {height} pixels is too large")
    if image.ndim == 2:
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    resized = np.empty((height, width, 3), np.uint8)
    _resize_into(image, [resized], threads)
    return resized


def model_inputs(
    image: UInt8Array, sam: SamTransform, clip: ClipTransform, threads: int | None = None
) -> tuple[UInt8Array, tuple[int, int], UInt8Array]:
    """An image (H, W, 3) as both encoders take it, from one reading of its pixels.

    Returns:
        What `sam.apply_image` gives, (S, S, 3) and the (height, width) of its valid part; and what
        `clip.apply_image` gives, (S', S', 3).
    """
    frame, valid = sam.empty_frame(image)
    square = np.empty((clip.image_size, clip.image_size, 3), np.uint8)
    _resize_into(image, [frame[: valid[0], : valid[1]], square], threads)
    return frame, valid, square


@dataclass(frozen=True, eq=False)
class EncoderInputs:
    """An image as both encoders take it, with the size that it had.

    Args:
        height, width: of the image, upright, in pixels.
        sam_image: (S, S, 3) uint8 RGB, in the SAM frame.
        input_size: (height, width) of the part of it that is not padding.
        clip_image: (S', S', 3) uint8 RGB.
    """

    height: int
    width: int
    sam_image: UInt8Array
    input_size: tuple[int, int]
    clip_image: UInt8Array

    @classmethod
    def of(
        cls,
        image: UInt8Array,
        sam: SamTransform,
        clip: ClipTransform,
        threads: int | None = None,
    ) -> EncoderInputs:
        """Of an image (H, W, 3) RGB; see `model_inputs`."""
        sam_image, input_size, clip_image = model_inputs(image, sam, clip, threads)
        return cls(image.shape[0], image.shape[1], sam_image, input_size, clip_image)


def scale_points(
    points: npt.ArrayLike, from_size: tuple[int, int], to_size: tuple[int, int]
) -> FloatArray:
    """Points (..., 2) xy from a frame of from_size (height, width) to one of to_size.

    Raises:
        InputError: `points` are no numbers or have another shape.
    """
    points = as_array(points, "points")
    if points.ndim == 0 or points.shape[-1] != 2 or points.dtype.kind not in "fiu":
        raise InputError(
            f"points must be numbers of the shape (..., 2), got {points.shape} {points.dtype}"
        )
    (from_height, from_width), (to_height, to_width) = from_size, to_size
    factors = np.array([to_width / from_width, to_height / from_height])
    scaled: FloatArray = (points.astype(np.float64) * factors).astype(np.float32)
    return scaled


@dataclass(frozen=True)
class SamTransform:
    """Between original-image pixels and the SAM frame: longest side to image_size, the rest zero,
    right and below.
    """

    image_size: int

    def __post_init__(self) -> None:
        checked_count(self.image_size, "image_size")

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image takes within the frame, rounded as SAM's
        ResizeLongestSide rounds.
        """
        scale = self.image_size * 1.0 / max(height, width)
        return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)

    def apply_image(
        self, image: UInt8Array, threads: int | None = None
    ) -> tuple[UInt8Array, tuple[int, int]]:
        """(H, W, 3) to (S, S, 3), and the (height, width) of its valid part; `threads` as
        `resize_image`.
        """
        frame, (height, width) = self.empty_frame(image)
        _resize_into(image, [frame[:height, :width]], threads)
        return frame, (height, width)

    def empty_frame(self, image: UInt8Array) -> tuple[UInt8Array, tuple[int, int]]:
        """Zeros (S, S, 3), and the (height, width) that the image (H, W, 3) takes there."""
        return np.zeros((self.image_size, self.image_size, 3), np.uint8), self.input_size(
            *image.shape[:2]
        )

    def apply_points(self, points: npt.ArrayLike, height: int, width: int) -> FloatArray:
        """Points (..., 2) xy of a height x width image, in the SAM frame."""
        return scale_points(points, (height, width), self.input_size(height, width))

    def apply_masks(self, masks: BoolArray, mask_size: tuple[int, int]) -> FloatArray:
        """Masks (N, H, W) as SAM's dense prompt: logits (N, 1, m, m) in the low-resolution SAM
        frame.

        The logits are those of how much of each cell the mask covers. SAM was trained on its own
        earlier logits as mask prompts; a mask from elsewhere has none, so its certainty is set by
        MASK_PROMPT_EPSILON.
        """
        n, height, width = masks.shape
        valid_height, valid_width = self.input_size(height, width)
        rows, columns = (self.image_size // size for size in mask_size)
        coverage = np.zeros((n, *mask_size), np.float32)
        for index, mask in enumerate(masks):
            frame = np.zeros((self.image_size, self.image_size), np.float32)
            grey = mask.astype(np.uint8) * np.uint8(255)
            frame[:valid_height, :valid_width] = resize_image(grey, valid_height, valid_width)
            coverage[index] = (
                frame.reshape(mask_size[0], rows, mask_size[1], columns).mean((1, 3)) / 255
            )
        probability = np.clip(coverage, MASK_PROMPT_EPSILON, 1 - MASK_PROMPT_EPSILON)
        logits: FloatArray = np.log(probability / (1 - probability))[:, None]  # (N, 1, m, m)
        return logits

    def encode_masks(self, low_res_masks: FloatArray, height: int, width: int) -> EncodedMasks:
        """Logits (n, m, m) to n masks of a height x width image, see
        `regionspot.masks.encode_mask_logits`.
        """
        valid = self.input_size(height, width)
        return encode_mask_logits(low_res_masks, self.image_size, valid, (height, width))


@dataclass(frozen=True)
class ClipTransform:
    """The whole image to a square of image_size, its aspect ratio not kept."""

    image_size: int

    def __post_init__(self) -> None:
        checked_count(self.image_size, "image_size")

    def apply_image(self, image: UInt8Array, threads: int | None = None) -> UInt8Array:
        """(H, W, 3) to (S, S, 3); `threads` as `resize_image`."""
        return resize_image(image, self.image_size, self.image_size, threads)


def crop_boxes(image: UInt8Array, boxes: npt.ArrayLike, scale: float = 1.0) -> list[UInt8Array]:
    """Cut boxes (N, 4) out of an image, each scaled about its centre, clipped to the image, rounded
    outwards.

    Raises:
        InputError: boxes that are not (N, 4) finite numbers.
    """
    height, width = image.shape[:2]
    low, high = np.split(_checked_boxes(boxes).astype(np.float64), 2, axis=1)  # (N, 2) each
    centre, half = (low + high) / 2, (high - low) / 2 * scale
    size = np.array([width, height])
    start = np.clip(np.floor(centre - half), 0, size - 1).astype(int)
    stop = np.clip(np.ceil(centre + half), start + 1, size).astype(int)
    return [image[y0:y1, x0:x1] for (x0, y0), (x1, y1) in zip(start, stop, strict=True)]


def flip_boxes(boxes: npt.ArrayLike, width: int) -> FloatArray:
    """Boxes (N, 4) of an image of that width as they lie once it is mirrored left to right.

    Raises:
        InputError: boxes that are not (N, 4) finite numbers.
    """
    x0, y0, x1, y1 = _checked_boxes(boxes).T
    return np.stack([width - x1, y0, width - x0, y1], axis=1)


def _checked_boxes(boxes: npt.ArrayLike) -> FloatArray:
    array = as_numbers(boxes, "boxes")
    if array.size == 0:
        return np.zeros((0, 4), np.float32)
    if array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
        raise InputError(f"boxes must be (N, 4) finite numbers, got the shape {array.shape}")
    return array


def _resize_into(image: UInt8Array, targets: Sequence[UInt8Array], threads: int | None) -> None:
    """Fill views (h, w, 3) whose pixels lie side by side in each row with an image (H, W, 3) at
    their sizes.
    """
    if image.strides[1:] != (3, 1):
        image = np.ascontiguousarray(image)
    _native.resize_rgb(image, targets, threads or default_threads())
