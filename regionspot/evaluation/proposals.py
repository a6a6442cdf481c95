"""Where the regions come from: the annotated boxes themselves, or a detector's results file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.data.coco_json import (
    MAX_COORDINATE,
    NORMALIZED_HINT,
    ROUNDED_TO_ZERO,
    Annotation,
    CocoDataset,
    ImageRecord,
    are_normalized,
)
from regionspot.data.json_reading import (
    FieldError,
    Id,
    identifier,
    number_column,
    number_rows,
    printable,
    read_json,
    shown,
)
from regionspot.errors import InputError
from regionspot.evaluation.detections import result_fields, result_name
from regionspot.evaluation.image_names import resolve_image_ids

FORMATS = (
    'COCO results, [{"image_id", "bbox": [x, y, width, height], "score"}, ...], or boxes by image '
    "id, "
    '{"IMAGE_ID": {"boxes": [[x0, y0, x1, y1], ...], "scores": [...]}, ...}'
)
ROUNDING = 1e-6  # a probability may be this far beyond 1


@dataclass(frozen=True, eq=False)
class Proposals:
    """The regions of every image of a data set.

    Args:
        source: what they are, in words that stand beside every number made from them.
        boxes: image id -> (N, 4) xyxy in original-image pixels; each overlaps its image.
        scores: image id -> (N,) the detector's scores, or None for boxes without any.
        num_dropped: boxes left out because they are empty or lie wholly outside their image.
        annotations: image id -> the annotation that each box is of, where the boxes are the ground
            truth.
    """

    source: str
    boxes: dict[Id, npt.NDArray[np.float64]]
    scores: dict[Id, npt.NDArray[np.float64]] | None
    num_dropped: int = 0
    annotations: dict[Id, tuple[Annotation, ...]] | None = None

    @property
    def num_regions(self) -> int:
        return sum(len(boxes) for boxes in self.boxes.values())


@dataclass(frozen=True, eq=False)
class _Columns:
    """M results of a file.

    Args:
        image_ids: as they are spelled there.
        boxes: (M, 4) xyxy.
        scores: (M,).
        file_format: in words.
        name: what errors call a row.
    """

    image_ids: Sequence[Id]
    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    file_format: str
    name: Callable[[int], str] = result_name


def ground_truth_proposals(dataset: CocoDataset, crowds: bool = False) -> Proposals:
    """Every annotated box in the file's order, without scores.

    Args:
        crowds: with those of crowds, which are objects like any other by LVIS's rules.
    """
    boxes, annotations, dropped = {}, {}, 0
    for image in dataset.images:
        objects = [a for a in dataset.annotations_by_image[image.id] if crowds or not a.iscrowd]
        candidates = np.array([a.box for a in objects], np.float64).reshape(-1, 4)
        usable = _overlaps_image(candidates, image)
        boxes[image.id] = candidates[usable]
        annotations[image.id] = tuple(a for a, kept in zip(objects, usable, strict=True) if kept)
        dropped += int((~usable).sum())
    return Proposals("ground-truth boxes", boxes, None, dropped, annotations)


def load_proposals(path: str | Path, dataset: CocoDataset) -> Proposals:
    """Reads a detector's boxes; an image without results has no regions.

    Two formats are read: COCO results, a list of `{"image_id", "bbox": [x, y, width, height],
    "score"}`; and that of the boxes which RegionSpot's authors publish, a dictionary `{image id:
    {"boxes": [[x0, y0, x1, y1], ...], "scores": [...]}}`. Other keys, the detector's own classes
    among them, are not read. Images may be named by their ids, or by their file names, with or
    without the ending, where that is unambiguous.

    Raises:
        InputError: no such file or format, an image that the data set does not have, a field
            without a usable value, a score that is no probability, boxes of negative size or as
            fractions of their picture.
    """
    path = Path(path)
    content = read_json(path, "the proposals", "A detector's results file")
    try:
        columns = _columns(content)
        _check(columns)
    except FieldError as error:
        raise InputError(f"{path}: {error}.") from error
    found = resolve_image_ids(path, columns.image_ids, dataset)
    rows_of: dict[Id, list[int]] = {image.id: [] for image in dataset.images}
    for row, spelled in enumerate(columns.image_ids):
        rows_of[found.ids[spelled]].append(row)
    boxes_of, scores_of, dropped = {}, {}, 0
    for image in dataset.images:
        rows = np.array(rows_of[image.id], np.int64)
        usable = _overlaps_image(columns.boxes[rows], image)
        boxes_of[image.id] = columns.boxes[rows[usable]]
        scores_of[image.id] = columns.scores[rows[usable]]
        dropped += int((~usable).sum())
    named = f", images named by their {found.named_by}" if found.named_by else ""
    source = f"detector boxes of {printable(path.name)} ({columns.file_format}{named})"
    return Proposals(source, boxes_of, scores_of, dropped)


def _overlaps_image(boxes: npt.NDArray[np.float64], image: ImageRecord) -> npt.NDArray[np.bool_]:
    """(N,) whether some of each box (N, 4) is left within the image, in the float32 that prompts
    are made of.
    """
    size = np.array([image.width, image.height] * 2, np.float32)
    clipped = np.clip(boxes.astype(np.float32), 0, size)
    return np.all(clipped[:, :2] < clipped[:, 2:], axis=1)


def _columns(content: Any) -> _Columns:
    if isinstance(content, list):
        return _coco_results(content)
    if not isinstance(content, dict):
        raise FieldError(f"must be {FORMATS}, not {shown(content)}")
    if "annotations" in content or "images" in content:
        raise FieldError(f"is an annotation file; a detector's results are wanted: {FORMATS}")
    return _boxes_by_image(content)


def _coco_results(results: list[Any]) -> _Columns:
    if results and isinstance(results[0], list):
        raise FieldError(f"is a list of lists; wanted are {FORMATS}")
    image_ids = result_fields(results, "image_id", identifier)
    boxes = number_rows(result_fields(results, "bbox"), "bbox", 4, result_name)
    scores = number_column(result_fields(results, "score"), "score", result_name)
    boxes[:, 2:] += boxes[:, :2]  # to xyxy
    return _Columns(image_ids, boxes, scores, "COCO results")


def _boxes_by_image(content: dict[str, Any]) -> _Columns:
    image_ids: list[Id] = []
    names: list[tuple[str, int]] = []
    boxes: list[Any] = []
    scores: list[Any] = []
    for image_id, entry in content.items():
        of_image = _entry(image_id, entry)
        image_ids += [image_id] * len(of_image["boxes"])
        names += [(image_id, index) for index in range(len(of_image["boxes"]))]
        boxes += of_image["boxes"]
        scores += of_image["scores"]

    def name(row: int) -> str:
        image_id, index = names[row]
        return f"image {shown(image_id)}: box {index}"

    return _Columns(
        image_ids,
        number_rows(boxes, "boxes", 4, name),
        number_column(scores, "scores", name),
        "boxes by image id, xyxy",
        name,
    )


def _entry(image_id: str, entry: Any) -> Mapping[str, list[Any]]:
    """The boxes and scores of one image. Raises FieldError."""
    where = f"image {shown(image_id)}"
    if not isinstance(entry, dict):
        raise FieldError(
            f"{where}: must be an object with boxes and scores, not {shown(entry)}. Wanted are "
            f"{FORMATS}"
        )
    for key in ("boxes", "scores"):
        if not isinstance(entry.get(key), list):
            raise FieldError(
                f"{where}: must have a list {key!r}, not {shown(entry.get(key))}. Wanted are "
                f"{FORMATS}"
            )
    if len(entry["boxes"]) != len(entry["scores"]):
        raise FieldError(
            f"{where}: has {len(entry['boxes'])} boxes and {len(entry['scores'])} scores"
        )
    return entry


def _check(columns: _Columns) -> None:
    """Raises FieldError for boxes and scores that are numbers but cannot be meant; rounds tiny
    negative sizes to 0.
    """
    boxes, scores = columns.boxes, columns.scores
    np.maximum(
        boxes[:, 2:],
        boxes[:, :2],
        out=boxes[:, 2:],
        where=boxes[:, 2:] - boxes[:, :2] >= ROUNDED_TO_ZERO,
    )
    negative = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if negative.any():
        first = int(np.flatnonzero(negative)[0])
        raise FieldError(
            f"{columns.name(first)}: its box has a negative size: x0, y0, x1, y1 are "
            f"{boxes[first].tolist()}; in {columns.file_format} that is no box"
        )
    if len(boxes) and np.abs(boxes).max() > 2 * MAX_COORDINATE:
        first = int(np.abs(boxes).max(1).argmax())
        raise FieldError(
            f"{columns.name(first)}: its box {boxes[first].tolist()} is far beyond any picture"
        )
    if are_normalized(boxes):
        raise FieldError(NORMALIZED_HINT.removesuffix("."))
    wrong = (scores < 0) | (scores > 1 + ROUNDING)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise FieldError(
            f"{columns.name(first)}: score: must be a probability from 0 to 1, because class "
            f"probabilities are multiplied by it, not {scores[first]:.6g} ({int(wrong.sum())} such "
            "scores). Are they logits or per cent?"
        )
