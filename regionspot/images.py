"""Reads images: a path, a file's bytes, a file object, a Pillow image or an array becomes
(H, W, 3) uint8 RGB, upright.

No other module opens an image file.
"""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, UnidentifiedImageError

from regionspot.arrays import as_array
from regionspot.errors import InputError, is_interrupt, plain_text, shown
from regionspot.jpeg_end import with_end_marker
from regionspot.structures import BoolArray, UInt8Array


class BinaryFile(Protocol):
    """A file object, opened for bytes."""

    def read(self) -> bytes: ...


ImageSource = (
    str | PathLike[str] | bytes | bytearray | memoryview | BinaryFile | Image.Image | UInt8Array
)

MAX_PIXELS = 178_000_000
"""Larger images are refused from their header; it is where Pillow, too, stops believing one."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is opened: Pillow knows more formats, some of which run other programs on the file."""

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
