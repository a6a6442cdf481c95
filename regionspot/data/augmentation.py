"""How the CLIP image is varied while the mask tokens stay as they are (spec: "Training recipe")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regionspot.structures import UInt8Array
from regionspot.transforms import crop_boxes, flip_boxes

MAX_CROPS = 10
"""So often a crop is drawn anew when it shows no region; then the image stays whole."""


@dataclass(frozen=True)
class CropFlip:
    """A random crop, then a random mirror image.

    The authors' recipe: mirror with probability 0.5; half of the time resize the shortest side to
    400, 500 or 600 and cut out 384 to 600 pixels each way; resize the shortest side to 480 to 800;
    and the model resizes to its S x S. Of these only the geometry and a little blur survive the
    last resize, so the crop is found in original pixels and the image is resized once, by the one
    definition in `regionspot.transforms`.

    The paper does not say what becomes of a region that is cropped away. The authors' data mapper
    filters the annotations by the crop but passes on the stored mask tokens of the whole image,
    labels included: `keep_cropped_regions` does so. Otherwise regions with no pixel inside the crop
    are left out, since CLIP's map no longer shows what their label says, and a crop that shows no
    region at all is drawn again.

    The mask tokens always are those of the whole, unmirrored image, as in the recipe.
    """

    flip_probability: float
    crop_probability: float
    shortest_side_before_crop: tuple[int, ...]
    crop_size: tuple[int, ...]
    keep_cropped_regions: bool = False

    def __call__(
        self, image: UInt8Array, boxes: npt.NDArray[np.float32], rng: np.random.Generator
    ) -> tuple[UInt8Array, npt.NDArray[np.bool_]]:
        """Vary an image.

        Returns:
            The new image, and which of the regions (N, 4) to train on: (N,) bool, at least one True
            if N > 0.
        """
        height, width = image.shape[:2]
        shown = np.ones(len(boxes), bool)
        flipped = rng.random() < self.flip_probability
        if flipped:
            boxes = flip_boxes(boxes, width)
        if rng.random() < self.crop_probability:
            if self.keep_cropped_regions:
                crop = self._draw_crop(height, width, rng)
            else:
                crop, shown = self._find_crop(height, width, boxes, rng)
            if flipped:
                image = np.ascontiguousarray(image[:, ::-1])
            return crop_boxes(image, crop[None])[0], shown
        return (np.ascontiguousarray(image[:, ::-1]) if flipped else image), shown

    def _find_crop(
        self, height: int, width: int, boxes: npt.NDArray[np.float32], rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """A crop (4,) xyxy in original pixels, and which boxes have a part in it."""
        for _ in range(MAX_CROPS):
            crop = self._draw_crop(height, width, rng)
            inside = np.all(
                np.maximum(boxes[:, :2], crop[:2]) < np.minimum(boxes[:, 2:], crop[2:]), axis=1
            )
            if inside.any() or not len(boxes):
                return crop, inside
        return np.array([0, 0, width, height], np.float64), np.ones(len(boxes), bool)

    def _draw_crop(
        self, height: int, width: int, rng: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        scale = rng.choice(self.shortest_side_before_crop) / min(height, width)
        size = np.array([width, height])
        resized = np.floor(size * scale + 0.5).astype(int)
        smallest = np.minimum(resized, self.crop_size[0])
        largest = np.minimum(resized, self.crop_size[1])
        extent = rng.integers(
            smallest, largest, endpoint=True
        )  # (2,) width and height after the resize
        corner = rng.integers(0, resized - extent, endpoint=True)
        whole = np.round(np.concatenate([corner, corner + extent]) / scale)
        return np.clip(whole, 0, np.concatenate([size, size])).astype(np.float64)
