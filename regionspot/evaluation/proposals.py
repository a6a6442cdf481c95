"""Where the regions come from: the annotated boxes themselves, or a detector's results file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.data.coco_json import CocoDataset, ImageRecord, first_few, read_json
from regionspot.errors import InputError


@dataclass(frozen=True, eq=False)
class Proposals:
    """The regions of every image of a data set.

    Args:
        source: what they are, in words that stand beside every number made from them.
        boxes: image id -> (N, 4) xyxy in original-image pixels; each overlaps its image.
        scores: image id -> (N,) the detector's scores, or None for boxes without any.
        num_dropped: boxes left out because they are empty or lie wholly outside their image.
    """

    source: str
    boxes: dict[int, npt.NDArray[np.float64]]
    scores: dict[int, npt.NDArray[np.float64]] | None
    num_dropped: int = 0

    @property
    def num_regions(self) -> int:
        return sum(len(boxes) for boxes in self.boxes.values())


def ground_truth_proposals(dataset: CocoDataset) -> Proposals:
    """Every annotated box but those of crowds, in the file's order, without scores."""
    boxes, dropped = {}, 0
    for image in dataset.images:
        objects = [a.box for a in dataset.annotations_by_image[image.id] if not a.iscrowd]
        candidates = np.array(objects, np.float64).reshape(-1, 4)
        usable = _overlaps_image(candidates, image)
        boxes[image.id] = candidates[usable]
        dropped += int((~usable).sum())
    return Proposals("ground-truth boxes", boxes, None, dropped)


def load_proposals(path: str | Path, dataset: CocoDataset) -> Proposals:
    """Read a detector's COCO-style results: a list of `{"image_id", "bbox": [x, y, width, height], "score"}`.

    Other keys, the detector's own classes among them, are not read. An image without results has no regions.

    Raises:
        InputError: no such file, not such a list, an image that the data set does not have, an image id that is no
            integer, a box or a score that is not finite, a size below 0.
    """
    path = Path(path)
    results = _read_results(path)
    image_ids, boxes, scores = _columns(path, results)
    known = {image.id for image in dataset.images}
    unknown = sorted(set(image_ids.tolist()) - known)
    if unknown:
        raise InputError(
            f"{path} has proposals for images that {dataset.path} does not list: ids {first_few(unknown)}. "
            "Are they of another split?"
        )
    order = np.argsort(image_ids, kind="stable")
    starts = np.searchsorted(image_ids[order], [image.id for image in dataset.images], side="left")
    stops = np.searchsorted(image_ids[order], [image.id for image in dataset.images], side="right")
    boxes_of, scores_of, dropped = {}, {}, 0
    for image, start, stop in zip(dataset.images, starts, stops, strict=True):
        rows = order[start:stop]
        usable = _overlaps_image(boxes[rows], image)
        boxes_of[image.id], scores_of[image.id] = boxes[rows[usable]], scores[rows[usable]]
        dropped += int((~usable).sum())
    return Proposals(f"detector boxes of {path.name}", boxes_of, scores_of, dropped)


def _overlaps_image(boxes: npt.NDArray[np.float64], image: ImageRecord) -> npt.NDArray[np.bool_]:
    """(N,) whether some of each box (N, 4) is left within the image, in the float32 that prompts are made of."""
    size = np.array([image.width, image.height] * 2, np.float32)
    clipped = np.clip(boxes.astype(np.float32), 0, size)
    return np.all(clipped[:, :2] < clipped[:, 2:], axis=1)


def _read_results(path: Path) -> list[dict[str, Any]]:
    results = read_json(path, "the proposals", "A list of COCO-style detection results")
    if not isinstance(results, list):
        raise InputError(f"{path} is no list of COCO-style detection results but a {type(results).__name__}.")
    return results


def _columns(
    path: Path, results: Sequence[dict[str, Any]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Image ids (M,), boxes (M, 4) xyxy and scores (M,)."""
    try:
        image_ids = np.array([_integer(result["image_id"]) for result in results], np.int64)
        boxes = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)
        scores = np.array([result["score"] for result in results], np.float64)
    except KeyError as error:
        raise InputError(f"{path}: a result has no key {error}; image_id, bbox and score are wanted.") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is no list of COCO-style detection results: {error}.") from error
    if len(boxes) != len(results):
        raise InputError(f"{path}: every bbox must be four numbers: x, y, width, height.")
    wrong = ~np.isfinite(boxes).all(1) | ~np.isfinite(scores) | (boxes[:, 2:] < 0).any(1)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"{path}: result {first} has bbox {boxes[first].tolist()} and score {scores[first]}; "
            "finite numbers are wanted, and a width and height of 0 or more."
        )
    boxes[:, 2:] += boxes[:, :2]
    return image_ids, boxes, scores


def _integer(image_id: Any) -> int:
    number = int(image_id)
    if isinstance(image_id, float) and image_id != number:
        raise ValueError(f"the image_id {image_id} is no integer")
    return number
