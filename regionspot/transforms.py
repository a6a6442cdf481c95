"""The only code that reads, resizes or flips an image, or moves coordinates from one frame to
another.

Every resize of pixels is Pillow's antialiased bilinear on uint8. It is what SAM's own preprocessing
does (`segment_anything.utils.transforms.ResizeLongestSide` through Pillow); for CLIP, which the
authors resize in two ways, it is our choice, and the same in training, evaluation, every runtime
and the server. Colours are resized by the native extension, which gives Pillow's numbers much
sooner and both encoders' pictures from one reading of the pixels.

Frames: original-image pixels are the public one; the SAM frame is the image resized to a longest
side of S, at the top left of an S x S square. Normalisation is not here: it belongs to the models.
"""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, UnidentifiedImageError

from regionspot.arrays import as_array, as_numbers, checked_count
from regionspot.errors import InputError, is_interrupt, plain_text, shown
from regionspot.jpeg_end import with_end_marker
from regionspot.masks import EncodedMasks, _native, encode_mask_logits
from regionspot.structures import BoolArray, FloatArray
from regionspot.threads import default_threads

UInt8Array = npt.NDArray[np.uint8]


class BinaryFile(Protocol):
    """A file object, opened for bytes."""

    def read(self) -> bytes: ...


ImageSource = (
    str | PathLike[str] | bytes | bytearray | memoryview | BinaryFile | Image.Image | UInt8Array
)

MAX_PIXELS = 178_000_000
"""Larger images are refused from their header; it is where Pillow, too, stops believing one."""

RESIZE = "Pillow bilinear on uint8, antialiased"
"""What `resize_image` does, in words: caches and artefacts that were made with another resize are
not used.

The words stay as long as the numbers are Pillow's, whoever computes them: tests/test_transforms.py
compares every byte.
"""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is opened: Pillow knows more formats, some of which run other programs on the file."""

MASK_PROMPT_EPSILON = 1e-3
"""A mask prompt's certainty: its logits are those of the probabilities 0.001 and 0.999."""

MASK_THRESHOLD = 127
"""A mask is True where a colour is brighter than this, of 255."""

# two letters or more: one is a drive of Windows
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    source: ImageSource,
    max_pixels: int = MAX_PIXELS,
    background: str = "white",
    formats: Sequence[str] = IMAGE_FORMATS,
) -> UInt8Array:
    """Any picture as (H, W, 3) uint8 RGB, upright.

    EXIF orientation is applied; transparency is laid over the background; palette, grey, CMYK,
    1-bit and 16-bit pictures are converted; of an animation the first frame is taken.

    Args:
        source: a path, an encoded file's bytes, a file object (read from its beginning where it can
            seek), a Pillow image, or a (H, W, 3) uint8 RGB array, returned as it is.
        max_pixels: refuse larger pictures, judging by the header before any pixel is decoded.
        background: a colour's name.
        formats: of files that are opened, by Pillow's names.

    Raises:
        InputError: no such file, not a picture, a damaged or truncated one, one that is too large;
            of a JPEG file only the end marker may be missing. The message names the whole path.
    """
    _check_colour(background)
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "the image", max_pixels, background)
    name = _described("image", source)
    with _open_file(source, name) as file:
        image = _open_image(file, name, formats)
        try:
            return _decode(image, name, max_pixels, background)
        except _Undecoded as error:
            whole = _whole_jpeg(image, file, formats)
            if whole is None:
                raise InputError(str(error)) from error.__cause__
            return _decode(whole, name, max_pixels, background)


def read_mask(source: ImageSource) -> BoolArray:
    """A picture as a mask (H, W): True where any of its colours is bright, False where it is dark
    or transparent.

    Raises:
        InputError: as `read_image`; nothing is bright: a mask of the values 0 and 1, a dark one, an
            empty one; or more of it is grey than white, as of class indices with a white border.
    """
    brightness = read_image(source, background="black").max(axis=2)
    mask: BoolArray = brightness > MASK_THRESHOLD
    grey = int(((brightness > 0) & ~mask).sum())
    if grey > mask.sum() or not mask.any():
        name = _described("mask", source)
        wanted = "white (255) is wanted on the region, black (0) or transparent elsewhere"
        if mask.any():
            raise InputError(
                f"more of {name} is grey than white ({grey} and {int(mask.sum())} pixels), and "
                f"{wanted}"
            )
        raise InputError(
            f"{name} is empty: its brightest value is {brightness.max()}, and {wanted}"
        )
    return mask


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


def _checked_array(array: npt.NDArray[np.generic]) -> UInt8Array:
    array = as_array(array, "an image array")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise InputError(
            f"an image array must be (H, W, 3) uint8 RGB, got {array.shape} {array.dtype}; "
            "convert it, or pass the file's path, its bytes or a Pillow image"
        )
    return array.view(np.uint8)


def _check_colour(background: str) -> None:
    try:
        ImageColor.getrgb(background)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"background must be a colour's name, such as 'white', got {shown(background)}"
        ) from error


def _described(kind: str, source: Any) -> str:
    """What messages call a picture: "image 'cat.jpg'", or "the image" where it has no name."""
    return (
        f"{kind} {plain_text(shown(os.fspath(source), 300))}"
        if isinstance(source, (str, PathLike))
        else f"the {kind}"
    )


def _open_file(source: Any, name: str) -> IO[bytes]:
    """The source as a file that can seek."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if callable(getattr(source, "read", None)):
        return _copied(source, name)
    if not isinstance(source, (str, PathLike)):
        raise InputError(
            "an image is a path, a file's bytes, a Pillow image or an array, not a "
            f"{type(source).__name__}"
        )
    try:
        file = open(source, "rb")  # noqa: SIM115
    except (
        OSError,
        ValueError,
    ) as error:  # no such file, a directory, no permission, a null character
        text = os.fsdecode(source)
        if _URL.match(text):
            raise InputError(
                f"{name} is a URL: URLs are not fetched; download the picture, and give its path"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{name} does not exist: no such file") from error
        raise InputError(f"{name} cannot be opened ({_reason(error)}): check the path") from error
    if file.seekable():
        return file
    with file:
        return _copied(file, name)  # a pipe


def _copied(source: Any, name: str) -> io.BytesIO:
    try:
        with suppress(OSError, AttributeError):  # io.UnsupportedOperation is an OSError
            source.seek(0)
        content = source.read()
    except Exception as error:  # file objects of other libraries raise anything
        if is_interrupt(error):
            raise
        raise InputError(f"{name} cannot be read ({_reason(error)}): check the file") from error
    if not isinstance(content, bytes):
        raise InputError(
            f"{name} is a file of {type(content).__name__}, not of bytes: open it with mode 'rb'"
        )
    return io.BytesIO(content)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _open_image(file: IO[bytes], name: str, formats: Sequence[str]) -> Image.Image:
    """The header alone: pixels are decoded later."""
    Image.init()
    # a small Pillow lacks some
    known = [file_format for file_format in formats if file_format in Image.OPEN]
    try:
        with _SILENCE:
            return Image.open(file, formats=known)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is not a picture that can be read: give one of {', '.join(known)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large ({error}): scale it down first") from error
    except Exception as error:  # damaged headers raise almost anything
        if is_interrupt(error):
            raise
        raise InputError(f"{name} cannot be opened ({_reason(error)}): check the file") from error


class _Silence:
    """Keeps Pillow's warnings back while any thread reads a picture.

    Pillow warns of every picture from half of MAX_PIXELS on, and of EXIF, TIFF and PNG parts that
    it leaves out. Warning filters are shared by all threads: the first that reads sets them, the
    last restores them.
    """

    def __init__(self) -> None:
        self._lock, self._readers = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                for category in (UserWarning, Image.DecompressionBombWarning):
                    warnings.filterwarnings("ignore", category=category, module=r"PIL\.")
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._filters.__exit__(None, None, None)


_SILENCE = _Silence()


class _Undecoded(InputError):
    """A picture whose pixels cannot be decoded."""


def _whole_jpeg(image: Image.Image, file: IO[bytes], formats: Sequence[str]) -> Image.Image | None:
    """A JPEG file that lacks its end marker alone, with the marker; None where more is missing."""
    if image.format not in ("JPEG", "MPO"):
        return None

    def opened(content: bytes) -> Image.Image:
        return _open_image(io.BytesIO(content), "the image", formats)

    with suppress(Exception):  # damaged data
        file.seek(0)
        content = with_end_marker(file.read(), lambda content: np.asarray(opened(content)))
        return None if content is None else opened(content)
    return None


def _decode(image: Image.Image, name: str, max_pixels: int, background: str) -> UInt8Array:
    _check_size(image, name, max_pixels)
    try:
        with _SILENCE:
            image.load()
            return np.array(_to_rgb(_upright(image), name, background))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # on damaged data Pillow's decoders raise almost anything
        if is_interrupt(error):
            raise
        raise _Undecoded(
            f"{name} is damaged or truncated ({error}): copy or export it again"
        ) from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"{name} is too large: {width} x {height} pixels, at most {max_pixels:,}; scale it "
            "down first"
        )
    if width * height == 0:
        raise InputError(f"{name} has no pixels: {width} x {height}")


def _upright(image: Image.Image) -> Image.Image:
    orientation = None
    with suppress(Exception):  # unreadable EXIF does not spoil the pixels
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image, name: str, background: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _to_eight_bits(np.asarray(image), name).convert("RGB")
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        return Image.alpha_composite(
            Image.new("RGBA", foreground.size, background), foreground
        ).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _to_eight_bits(samples: npt.NDArray[np.generic], name: str) -> Image.Image:
    if samples.dtype.kind == "f" or samples.min() < 0 or samples.max() >= 2**16:
        raise InputError(
            f"{name} holds 32-bit samples of unknown range: save it with 8 or 16 bits for each"
        )
    return Image.fromarray(((samples.astype(np.uint32) + 128) // 257).astype(np.uint8))
