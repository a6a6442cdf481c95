"""Segmentations of annotation files and of results as run lengths at their picture's size, or the
reason why not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import hotcoco.mask
import numpy as np

from regionspot.data.coco_json import Annotation, CocoDataset
from regionspot.data.json_reading import FieldError, integer, number, shown
from regionspot.errors import InputError, first_few
from regionspot.masks import Rle, rle_area

POLYGON_NUMBERS = 6  # of a triangle
FARTHEST = 10  # a polygon may reach this many times the picture's sides beyond it

_known: WeakKeyDictionary[CocoDataset, tuple[Rle, ...]] = WeakKeyDictionary()


def annotations_of(dataset: CocoDataset) -> Iterator[Annotation]:
    """All annotations, image after image."""
    return (
        annotation
        for image in dataset.images
        for annotation in dataset.annotations_by_image[image.id]
    )


def ground_truth_masks(dataset: CocoDataset) -> tuple[Rle, ...]:
    """The masks of `annotations_of(dataset)`. Converted once for each data set.

    Raises:
        InputError: annotations without a usable mask, with the reason for the first few.
    """
    if dataset not in _known:
        _known[dataset] = _converted(dataset)
    return _known[dataset]


def odd_masks(dataset: CocoDataset) -> tuple[int, int]:
    """How many masks of the ground truth cover no pixel, and how many do not even touch their own
    boxes.
    """
    masks: list[Any] = list(ground_truth_masks(dataset))
    drawn = hotcoco.mask.to_bbox(masks).reshape(-1, 4)  # xywh
    # xyxy
    boxes = np.array([annotation.box for annotation in annotations_of(dataset)]).reshape(-1, 4)
    empty = (drawn[:, 2:] <= 0).any(1)
    apart = (drawn[:, :2] + drawn[:, 2:] <= boxes[:, :2]).any(1) | (
        boxes[:, 2:] <= drawn[:, :2]
    ).any(1)
    return int(empty.sum()), int((apart & ~empty).sum())


def _converted(dataset: CocoDataset) -> tuple[Rle, ...]:
    masks, problems = [], []
    for image in dataset.images:
        for annotation in dataset.annotations_by_image[image.id]:
            if annotation.segmentation is None:
                problems.append(f"annotation {shown(annotation.id)} has no segmentation")
                continue
            try:
                masks.append(as_rle(annotation.segmentation, image.height, image.width))
            except FieldError as error:
                problems.append(f"annotation {shown(annotation.id)}: {error}")
    if problems:
        raise InputError(
            f"{dataset.path}: {len(problems)} of {dataset.num_annotations} annotations have no "
            f"usable mask: {first_few(problems)}. Correct them, or evaluate boxes alone "
            "(--iou-type bbox)."
        )
    return tuple(masks)


def as_rle(segmentation: Any, height: int, width: int) -> Rle:
    """Polygons, or compressed or plain run lengths, as compressed run lengths of a picture's size.

    A flat list of numbers is one polygon. Beside whole polygons, those of one or two points add
    nothing.

    Raises:
        FieldError: none of these, numbers that are not finite, no polygon of three points, run
            lengths of another size or that do not fill it.
    """
    if height * width >= 2**32:
        raise FieldError(
            f"segmentation: a picture of {width} x {height} pixels is too large for masks (2^32 or "
            "more)"
        )
    if isinstance(segmentation, Mapping):
        return _checked_rle(segmentation, height, width)
    if not isinstance(segmentation, list | tuple):
        raise FieldError(
            f"segmentation: must be a list of polygons or an RLE object, not {shown(segmentation)}"
        )
    parts = (
        segmentation
        if any(isinstance(part, list | tuple) for part in segmentation)
        else [segmentation]
    )
    polygons = [_polygon(part, height, width) for part in parts]
    whole = [polygon for polygon in polygons if len(polygon) >= POLYGON_NUMBERS]
    if not whole:
        raise FieldError(
            f"segmentation: no polygon has three points or more: {shown(segmentation)}"
        )
    found = hotcoco.mask.merge(hotcoco.mask.frPyObjects(whole, height, width))
    return {"size": [height, width], "counts": found["counts"].decode()}


def _polygon(part: Any, height: int, width: int) -> list[float]:
    if not isinstance(part, list | tuple):
        raise FieldError(f"segmentation: a polygon must be a list of numbers, not {shown(part)}")
    if len(part) % 2:
        raise FieldError(
            f"segmentation: a polygon must have an even count of numbers, x and y, not {len(part)}"
        )
    polygon = [number(value, "segmentation") for value in part]
    reach = FARTHEST * max(height, width)
    if any(not -reach <= value <= reach + max(height, width) for value in polygon):
        raise FieldError(
            f"segmentation: a polygon reaches far beyond the picture of {width} x {height}: "
            f"{shown(part)}"
        )
    return polygon


def _checked_rle(segmentation: Mapping[str, Any], height: int, width: int) -> Rle:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list | tuple) or [integer(side, "size") for side in size] != [
        height,
        width,
    ]:
        raise FieldError(
            f"segmentation: its size {shown(size)} is not the picture's [{height}, {width}] "
            "(height, width)"
        )
    if isinstance(counts, list | tuple):
        counts = _compressed([integer(run, "counts") for run in counts], height, width)
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    if not isinstance(counts, str) or not counts.isascii():
        raise FieldError(
            f"segmentation: counts: must be run lengths, compressed or a list, not {shown(counts)}"
        )
    rle: Rle = {"size": [height, width], "counts": counts}
    try:
        rle_area(rle)
    except InputError as error:
        raise FieldError(f"segmentation: {error}") from error
    return rle


def _compressed(runs: list[int], height: int, width: int) -> bytes:
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise FieldError(
            f"segmentation: counts: must be 0 or more and sum to the picture's {height * width} "
            f"pixels, not to {shown(sum(runs))}"
        )
    found = hotcoco.mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return bytes(found["counts"])
