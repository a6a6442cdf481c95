"""What a load asks a server: pictures with boxes, from annotations or of the mini world, and their
bytes made new.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from regionspot.data.formats import load_dataset
from regionspot.errors import InputError
from regionspot.masks import mask_to_box
from regionspot.mini.dataset import JPEG_QUALITY, SPLITS
from regionspot.mini.render import render_scene
from regionspot.mini.world import UNIFORM_WEIGHTS, sample_scene
from regionspot.structures import FloatArray

MINI_PICTURES = 24
MAX_SHIFT = 8  # pixels
_JPEG, _COMMENT = b"\xff\xd8\xff", b"\xff\xfe"


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture's file.

    Args:
        encoded: its bytes.
        width, height: in pixels.
        boxes: (N, 4) float32 xyxy in pixels, inside the picture and not empty; N is 1 or more.
    """

    encoded: bytes
    width: int
    height: int
    boxes: FloatArray

    def regions(self, count: int | None) -> FloatArray:
        """The first `count` boxes, repeated a few pixels nearer to the middle if there are fewer;
        None takes all.
        """
        if count is None:
            return self.boxes
        index = np.arange(count)
        boxes = self.boxes[index % len(self.boxes)]  # (count, 4)
        steps = index // len(self.boxes)
        shift = np.where(steps > 0, 1 + (steps - 1) % MAX_SHIFT, 0)[:, None]  # (count, 1)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2  # (count, 2)
        shifts = np.where(
            middle < np.array([self.width, self.height]) / 2, shift, -shift
        )  # (count, 2)
        return _inside(boxes + np.tile(shifts, 2), self.width, self.height)


def pictures_of(data: str | Path | None, seed: int) -> list[Picture]:
    """Those of an annotation file that have boxes; of None, MINI_PICTURES of the mini world.

    Raises:
        InputError: the file cannot be used, or has no boxes.
    """
    if data is None:
        return [_mini_picture(seed, index) for index in range(MINI_PICTURES)]
    dataset = load_dataset(data)
    found = []
    for record in dataset.images:
        boxes = [annotation.box for annotation in dataset.annotations_by_image[record.id]]
        usable = _usable(np.array(boxes, np.float32).reshape(-1, 4), record.width, record.height)
        if len(usable):
            found.append(
                Picture(
                    dataset.image_path(record).read_bytes(), record.width, record.height, usable
                )
            )
    if not found:
        raise InputError(f"{data} has no picture with a box in it, and so nothing to ask about")
    return found


def never_seen(jpeg: bytes) -> bytes:
    """The same picture in other bytes, which no cache has met: a comment behind the start marker
    changes no pixel.

    Raises:
        InputError: these bytes are no JPEG.
    """
    if not jpeg.startswith(_JPEG):
        raise InputError(
            "only a JPEG can be made a new picture without changing a pixel: use JPEGs, or "
            "--picture known"
        )
    comment = uuid.uuid4().bytes
    return jpeg[:2] + _COMMENT + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def mean_regions(pictures: Sequence[Picture], count: int | None) -> float:
    """Boxes of a request: `count`, or the mean of the pictures' own."""
    return (
        count
        if count is not None
        else round(sum(len(one.boxes) for one in pictures) / len(pictures), 2)
    )


def _mini_picture(seed: int, index: int) -> Picture:
    """The same scene that `regionspot mini build` writes into its validation split."""
    rng = np.random.default_rng([seed, SPLITS["val"], index])
    pixels, toys = render_scene(sample_scene(rng, UNIFORM_WEIGHTS))  # (H, W, 3)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    boxes = np.stack([mask_to_box(mask) for _, mask in toys])
    return Picture(encoded.getvalue(), pixels.shape[1], pixels.shape[0], boxes)


def _usable(boxes: FloatArray, width: int, height: int) -> FloatArray:
    """(N, 4): their parts inside the picture, without those that are less than a pixel wide or
    high.
    """
    clipped = _inside(boxes, width, height)
    return clipped[(clipped[:, 2:] - clipped[:, :2] >= 1).all(1)]


def _inside(boxes: FloatArray, width: int, height: int) -> FloatArray:
    return np.clip(boxes, 0, np.array([width, height] * 2)).astype(np.float32)
