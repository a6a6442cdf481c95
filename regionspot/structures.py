"""The few types that everything here speaks: prompts in, a vocabulary beside them, predictions out.

All coordinates are pixels of the original image, x to the right and y down, the origin at the top-left corner of the
top-left pixel. Boxes are xyxy: `(x0, y0, x1, y1)` with `x0 < x1` and `y0 < y1`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from regionspot.errors import InputError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

FOREGROUND, BACKGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, PADDING = 1, 0, 2, 3, -1
POINT_LABELS = (FOREGROUND, BACKGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, PADDING)
UNIT_LENGTH_TOLERANCE = 1e-3


class Rle(TypedDict):
    """A binary mask as COCO's compressed run lengths: `size` is `[height, width]`, `counts` the ASCII string."""

    size: list[int]
    counts: str


@dataclass(frozen=True, eq=False)
class Prompts:
    """N regions of one image, each asked for by P labelled points.

    Args:
        points: (N, P, 2) xy in original-image pixels.
        labels: (N, P) in SAM's ONNX convention: 1 foreground, 0 background, 2 and 3 the top-left and bottom-right
            corner of a box, -1 padding (its coordinates mean nothing).
        mask_inputs: (N, H, W) at the original image's size, a mask for each region as SAM's dense prompt, or None.

    Raises:
        InputError: shapes that do not belong together, an unknown label, half a box.
    """

    points: FloatArray
    labels: IntArray
    mask_inputs: BoolArray | None = None

    def __post_init__(self) -> None:
        n, p = self.points.shape[:2] if self.points.ndim == 3 else (-1, -1)
        if p < 1 or self.points.shape != (n, p, 2) or self.labels.shape != (n, p):
            raise InputError(
                f"prompts need points (N, P, 2) and labels (N, P), got {self.points.shape} and {self.labels.shape}; "
                "build them with Prompts.from_boxes, from_points or from_masks"
            )
        if not np.isin(self.labels, POINT_LABELS).all():
            unknown = sorted(set(self.labels.ravel().tolist()) - set(POINT_LABELS))
            raise InputError(f"unknown point labels {unknown}: use 1 for foreground and 0 for background")
        corners = np.stack([(self.labels == corner).sum(1) for corner in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)])  # (2, N)
        if (corners[0] != corners[1]).any() or (corners > 1).any():
            raise InputError("a box is exactly one point labelled 2 and one labelled 3: build it with from_boxes")
        masks = self.mask_inputs
        if masks is not None and (masks.ndim != 3 or len(masks) != n):
            raise InputError(f"mask_inputs must have shape ({n}, H, W), one for each region, got {masks.shape}")

    @classmethod
    def empty(cls) -> Prompts:
        """No region, with the two points for each that boxes have."""
        return cls(np.zeros((0, 2, 2), np.float32), np.zeros((0, 2), np.int32))

    @classmethod
    def from_boxes(cls, boxes: npt.ArrayLike) -> Prompts:
        """One region for each box: (N, 4) xyxy."""
        array = _as_numbers(boxes, "boxes")
        if array.ndim and len(array) == 0:
            return cls.empty()
        if array.ndim != 2 or array.shape[1] != 4:
            raise InputError(
                f"boxes must have shape (N, 4), x0, y0, x1, y1 for each, got {array.shape}"
                + ("; wrap a single box in a list" if array.shape == (4,) else "")
            )
        labels = np.tile(np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32), (len(array), 1))
        return cls(array.reshape(-1, 2, 2), labels)

    @classmethod
    def from_points(cls, points: npt.ArrayLike, labels: npt.ArrayLike | None = None) -> Prompts:
        """One region for each row: (N, 2), a click each, or (N, K, 2), K clicks each; labels (N,) or (N, K).

        Labels are 1 (foreground, the default) or 0 (background). SAM's padding point is appended, as SAM's own
        predictor does for every prompt without a box: P = K + 1.
        """
        array = _as_numbers(points, "points")
        if array.ndim and len(array) == 0:
            return cls.empty()
        if array.ndim not in (2, 3) or array.shape[-1] != 2:
            raise InputError(
                f"points must have shape (N, 2) or (N, K, 2), x, y for each click, got {array.shape}"
                + ("; wrap a single point in a list" if array.shape == (2,) else "")
            )
        clicks = array.reshape(len(array), -1, 2)  # (N, K, 2)
        click_labels = _click_labels(labels, array.shape[:-1]).reshape(clicks.shape[:2])  # (N, K)
        return cls(
            np.pad(clicks, ((0, 0), (0, 1), (0, 0))),  # (N, K + 1, 2)
            np.pad(click_labels, ((0, 0), (0, 1)), constant_values=PADDING),
        )

    @classmethod
    def from_masks(cls, masks: npt.ArrayLike) -> Prompts:
        """One region for each mask: (N, H, W) at the original image's size; its box, and the mask as dense prompt."""
        from regionspot.masks import mask_to_box

        array = np.asarray(masks)
        if array.ndim and len(array) == 0:
            return cls.empty()
        if array.ndim != 3:
            raise InputError(
                f"masks must have shape (N, H, W), got {array.shape}"
                + ("; wrap a single mask in a list" if array.ndim == 2 else "")
            )
        if array.dtype.kind not in "bui":
            raise InputError(f"masks must be bool or 0 and 1, got {array.dtype}; threshold them first (masks > 0)")
        array = array.astype(bool)
        for index, mask in enumerate(array):
            if not mask.any():
                raise InputError(f"mask {index} is empty: it covers no pixel, so it names no region; leave it out")
        boxes = cls.from_boxes(np.stack([mask_to_box(mask) for mask in array]))
        return cls(boxes.points, boxes.labels, array)

    @classmethod
    def concatenate(cls, prompts: Sequence[Prompts]) -> Prompts:
        """All regions in order. Every part needs the same P: padding a prompt further would change SAM's answer."""
        parts = [part for part in prompts if len(part)]
        if not parts:
            return cls.empty()
        widths = sorted({part.points.shape[1] for part in parts})
        if len(widths) > 1:
            raise InputError(f"cannot join prompts of {widths} points each: keep them apart, one Prompts for each kind")
        masks = [part.mask_inputs for part in parts if part.mask_inputs is not None]
        if masks and (len(masks) < len(parts) or len({mask.shape[1:] for mask in masks}) > 1):
            raise InputError("cannot join prompts with mask inputs to ones without, or with masks of another size")
        return cls(
            np.concatenate([part.points for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate(masks) if masks else None,
        )

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, regions: slice) -> Prompts:
        masks = None if self.mask_inputs is None else self.mask_inputs[regions]
        return Prompts(self.points[regions], self.labels[regions], masks)

    @property
    def boxes(self) -> FloatArray:
        """(N, 4) xyxy: a region's box, or the bounding box of its foreground points (its area may be zero)."""
        corner = (self.labels == BOX_TOP_LEFT) | (self.labels == BOX_BOTTOM_RIGHT)  # (N, P)
        used = np.where(corner.any(1, keepdims=True), corner, self.labels == FOREGROUND)
        used = np.where(used.any(1, keepdims=True), used, self.labels != PADDING)[..., None]  # (N, P, 1)
        low = np.where(used, self.points, np.inf).min(1, initial=np.inf)  # (N, 2)
        high = np.where(used, self.points, -np.inf).max(1, initial=-np.inf)
        return np.concatenate([low, high], axis=1).astype(np.float32)

    def validated(self, height: int, width: int) -> Prompts:
        """These prompts checked against an image of height x width pixels; a box partly outside is clipped to it.

        Raises:
            InputError: NaN or infinite coordinates, an inverted or empty box, a box wholly outside the image, a click
                outside it, a mask of another size; the message names the region's index and its value.
        """
        size = np.array([width, height], np.float32)
        image = f"the image is {width} x {height} pixels (width x height); prompts are in its pixels, origin top left"
        finite = np.isfinite(self.points).all(-1) | (self.labels == PADDING)  # (N, P)
        self._refuse(~finite.all(1), "has a coordinate that is NaN or infinite; every coordinate must be a number")
        has_box = (self.labels == BOX_TOP_LEFT).any(1)  # (N,)
        low, high = self._corner(BOX_TOP_LEFT), self._corner(BOX_BOTTOM_RIGHT)  # (N, 2) each
        self._refuse(
            has_box & ~(low < high).all(1),
            "is inverted or empty: boxes are x0, y0, x1, y1 with x0 < x1 and y0 < y1 (not x, y, width, height)",
        )
        self._refuse(has_box & ((low >= size) | (high <= 0)).any(1), f"lies wholly outside the image: {image}")
        click = (self.labels == FOREGROUND) | (self.labels == BACKGROUND)
        outside = ((self.points < 0) | (self.points > size)).any(-1)
        self._refuse((click & outside).any(1), f"lies outside the image: {image}")
        masks = self.mask_inputs
        if masks is not None and masks.shape[1:] != (height, width):
            raise InputError(
                f"masks are {masks.shape[2]} x {masks.shape[1]} pixels (width x height) but the image is "
                f"{width} x {height}: give them at the image's own size"
            )
        return Prompts(np.clip(self.points, 0, size), self.labels, masks)

    def _corner(self, label: int) -> FloatArray:
        """(N, 2): each region's point with that label, or its first point where it has none."""
        corner: FloatArray = self.points[np.arange(len(self)), (self.labels == label).argmax(1)]
        return corner

    def _refuse(self, wrong: BoolArray, reason: str) -> None:
        if not wrong.any():
            return
        indices = np.flatnonzero(wrong)
        first = int(indices[0])
        points = self.points[first][self.labels[first] != PADDING]  # (P', 2)
        is_box = bool((self.labels[first] == BOX_TOP_LEFT).any())
        value = ", ".join(f"{_shortest(number):.9g}" for number in points.ravel())
        more = f" ({len(indices) - 1} more like it)" if len(indices) > 1 else ""
        raise InputError(f"{'box' if is_box else 'point'} {first} [{value}] {reason}{more}")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """V class names and their text embeddings, (V, E) with rows of unit length.

    Raises:
        InputError: no name, a blank or repeated one, embeddings of another shape or not of unit length.
    """

    names: tuple[str, ...]
    embeddings: FloatArray

    def __post_init__(self) -> None:
        check_class_names(self.names)
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.names):
            raise InputError(
                f"a vocabulary of {len(self.names)} names needs embeddings ({len(self.names)}, E), "
                f"got {self.embeddings.shape}"
            )
        lengths = np.linalg.norm(self.embeddings.astype(np.float64), axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_LENGTH_TOLERANCE))
        if len(wrong):
            name, length = self.names[wrong[0]], lengths[wrong[0]]
            raise InputError(f"the embedding of {name!r} has length {length:.4g}, not 1: normalise the rows")

    def __len__(self) -> int:
        return len(self.names)


def check_class_names(names: Sequence[str]) -> None:
    """Raises InputError for an empty vocabulary, a blank name or repeated names, which it lists."""
    if not names:
        raise InputError("the vocabulary is empty: name at least one class")
    if any(not name.strip() for name in names):
        blank = next(index for index, name in enumerate(names) if not name.strip())
        raise InputError(f"name {blank} of the vocabulary is blank: leave it out")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        listed = ", ".join(map(repr, repeated[:10])) + (", ..." if len(repeated) > 10 else "")
        raise InputError(f"the vocabulary names {listed} more than once: give each class once")


@dataclass(frozen=True, eq=False)
class RegionPredictions:
    """What one image's N regions are, out of V classes.

    Args:
        image_height, image_width: the original image, in pixels.
        boxes: (N, 4) xyxy in original-image pixels.
        class_names: the V names that class ids index.
        scores: (N,) probability of the best class (softmax over the vocabulary).
        class_ids: (N,) the best class.
        top_class_ids, top_scores: (N, K) the K best, best first.
        masks: N masks at the original image's size, or None where none were asked for.
        iou_predictions: (N,) SAM's own estimate of each mask's IoU, or None.
    """

    image_height: int
    image_width: int
    boxes: FloatArray
    class_names: tuple[str, ...]
    scores: FloatArray
    class_ids: npt.NDArray[np.integer]
    top_class_ids: npt.NDArray[np.integer]
    top_scores: FloatArray
    masks: tuple[Rle, ...] | None = None
    iou_predictions: FloatArray | None = None

    def __post_init__(self) -> None:
        n = len(self.boxes)
        lengths = {
            name: len(value)
            for name in ("scores", "class_ids", "top_class_ids", "top_scores", "masks", "iou_predictions")
            if (value := getattr(self, name)) is not None
        }
        wrong = {name: length for name, length in lengths.items() if length != n}
        if wrong or self.boxes.shape != (n, 4):
            raise InputError(f"predictions of {self.boxes.shape} boxes need every field as long, got {wrong}")

    def __len__(self) -> int:
        return len(self.boxes)

    def to_json(self, file_name: str) -> dict[str, Any]:
        """The image and its regions as plain JSON values; `mask` and `iou` are null where there are none."""
        image = {"file_name": file_name, "width": self.image_width, "height": self.image_height}
        return {"image": image, "regions": [self._region(index) for index in range(len(self))]}

    def to_coco(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """COCO results, one for each region's best class; category_ids (V,) are the ids of class_names in order."""
        if len(category_ids) != len(self.class_names):
            raise InputError(f"{len(category_ids)} category ids for {len(self.class_names)} classes: give one for each")
        results: list[dict[str, Any]] = []
        for index, (x0, y0, x1, y1) in enumerate(self.boxes.astype(np.float64).tolist()):
            result = {
                "image_id": image_id,
                "category_id": int(category_ids[int(self.class_ids[index])]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(self.scores[index]),
            }
            results.append(result if self.masks is None else result | {"segmentation": self.masks[index]})
        return results

    def _region(self, index: int) -> dict[str, Any]:
        top = zip(self.top_class_ids[index], self.top_scores[index], strict=True)
        ious = self.iou_predictions
        return {
            "box": [_shortest(value) for value in self.boxes[index]],
            "class": self.class_names[int(self.class_ids[index])],
            "score": _shortest(self.scores[index]),
            "top": [[self.class_names[int(class_id)], _shortest(score)] for class_id, score in top],
            "mask": None if self.masks is None else self.masks[index],
            "iou": None if ious is None else _shortest(ious[index]),
        }


def _shortest(value: np.floating[Any]) -> float:
    """The float that prints with the fewest digits and still reads back as the same float32."""
    return float(str(np.float32(value)))


def _as_numbers(values: npt.ArrayLike, what: str) -> FloatArray:
    try:
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype=np.float64).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be a rectangular array of numbers: {error}") from error


def _click_labels(labels: npt.ArrayLike | None, shape: tuple[int, ...]) -> IntArray:
    if labels is None:
        return np.full(shape, FOREGROUND, np.int32)
    array = _as_numbers(labels, "point labels")
    if array.shape != shape:
        raise InputError(f"point labels must have shape {shape}, one for each click, got {array.shape}")
    if not np.isin(array, (FOREGROUND, BACKGROUND)).all():
        raise InputError(f"point labels must be 1 (foreground) or 0 (background), got {np.unique(array).tolist()}")
    return array.astype(np.int32)
