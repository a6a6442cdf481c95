"""Pictures, boxes and words where no real ones are given. The same seed gives the same."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from regionspot.errors import InputError
from regionspot.images import MAX_PIXELS, read_image
from regionspot.structures import FloatArray, UInt8Array
from regionspot.transforms import resize_image

JPEG_QUALITY = 90
SMALLEST_BOX = 8  # pixels


def read_picture(asked: str, seed: int) -> tuple[bytes, str]:
    """A file's bytes and what it is in words. Raises InputError for a path that is none, or an
    impossible size.
    """
    size = re.fullmatch(r"(\d+)x(\d+)", asked)
    if size is None:
        pixels = read_image(asked)
        content = Path(asked).read_bytes()
        return content, f"{Path(asked).name}, {_described(pixels, content)}"
    width, height = int(size[1]), int(size[2])
    if min(width, height) < SMALLEST_BOX or width * height > MAX_PIXELS:
        raise InputError(
            f"--picture {asked}: a side has {SMALLEST_BOX} pixels or more, all together "
            f"{MAX_PIXELS:,}"
        )
    pixels = generated_picture(height, width, np.random.default_rng(seed))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue(), f"generated, {_described(pixels, file.getvalue())}, JPEG"


def _described(pixels: UInt8Array, content: bytes) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}, {len(content) / 1e3:.0f} kB"


def generated_picture(height: int, width: int, rng: np.random.Generator) -> UInt8Array:
    """(height, width, 3): soft patches of colour under a little grain, about as hard to compress as
    a photograph.
    """
    coarse = rng.integers(0, 256, (max(2, height // 60), max(2, width // 60), 3), dtype=np.uint8)
    grain = rng.normal(0, 6, (height, width, 1)).astype(np.float32)
    return np.clip(resize_image(coarse, height, width) + grain, 0, 255).astype(np.uint8)


def random_boxes(count: int, height: int, width: int, rng: np.random.Generator) -> FloatArray:
    """(count, 4) xyxy of all sizes within a picture."""
    size = np.array([width, height])
    low, high = np.split(
        np.sort(rng.random((count, 2, 2)), axis=1) * size, 2, axis=1
    )  # (count, 1, 2) each
    low = np.minimum(low, size - SMALLEST_BOX)
    return (
        np.concatenate([low, np.maximum(high, low + SMALLEST_BOX)], axis=1)
        .reshape(count, 4)
        .astype(np.float32)
    )


def random_words(count: int, embed_dim: int, rng: np.random.Generator) -> FloatArray:
    """(count, embed_dim) unit rows: what stands for the words' embeddings."""
    rows = rng.standard_normal((count, embed_dim), np.float32)
    unit: FloatArray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
