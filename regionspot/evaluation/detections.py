"""Detections of a whole data set, kept as columns: 300 000 of them are 17 MB, as COCO dictionaries 200."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.errors import InputError
from regionspot.structures import Rle


@dataclass(frozen=True, eq=False)
class Detections:
    """M detections of any number of images.

    Args:
        image_ids, category_ids: (M,) ids of the annotation file.
        boxes: (M, 4) xyxy in original-image pixels.
        scores: (M,).
        masks: M masks at their image's size, or None. Pairs of one region share one object.

    Raises:
        InputError: columns of different lengths, a score or a box that is not finite.
    """

    image_ids: npt.NDArray[np.int64]
    category_ids: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    masks: Sequence[Rle] | None = None

    def __post_init__(self) -> None:
        m = len(self.scores)
        columns = (self.image_ids, self.category_ids, self.boxes, *([] if self.masks is None else [self.masks]))
        if any(len(column) != m for column in columns) or self.boxes.shape != (m, 4):
            raise InputError(
                f"detections need columns of one length and boxes (M, 4), got {[len(column) for column in columns]} "
                f"beside {m} scores and boxes {self.boxes.shape}"
            )
        broken = np.flatnonzero(~np.isfinite(self.scores) | ~np.isfinite(self.boxes).all(1))
        if len(broken):
            first = int(broken[0])
            raise InputError(
                f"detection {first} (image {self.image_ids[first]}) has score {self.scores[first]} and box "
                f"{self.boxes[first].tolist()}; numbers must be finite ({len(broken)} such detections)"
            )

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """All detections in order. Masks are kept when every part has them."""
        if not parts:
            return cls.from_coco([])
        masks: list[Rle] | None = [] if all(part.masks is not None for part in parts) else None
        if masks is not None:
            for part in parts:
                masks.extend(part.masks or ())
        return cls(
            np.concatenate([part.image_ids for part in parts]),
            np.concatenate([part.category_ids for part in parts]),
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            masks,
        )

    @classmethod
    def from_coco(cls, results: Iterable[Mapping[str, Any]]) -> Detections:
        """From COCO result dictionaries: `image_id`, `category_id`, `bbox` (xywh), `score`, perhaps `segmentation`."""
        results = list(results)
        boxes = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        has_masks = bool(results) and all("segmentation" in result for result in results)
        return cls(
            np.array([result["image_id"] for result in results], np.int64),
            np.array([result["category_id"] for result in results], np.int64),
            boxes,
            np.array([result["score"] for result in results], np.float64),
            [result["segmentation"] for result in results] if has_masks else None,
        )

    def to_coco(self) -> list[dict[str, Any]]:
        """As COCO result dictionaries, ready for `json.dump`."""
        columns = zip(
            self.image_ids.tolist(),
            self.category_ids.tolist(),
            self.xywh.tolist(),
            self.scores.tolist(),
            strict=True,
        )
        results = [dict(zip(("image_id", "category_id", "bbox", "score"), row, strict=True)) for row in columns]
        for result, mask in zip(results, self.masks or (), strict=False):
            result["segmentation"] = mask
        return results

    @property
    def xywh(self) -> npt.NDArray[np.float64]:
        """(M, 4) boxes as COCO writes them: x, y, width, height."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)

    def __len__(self) -> int:
        return len(self.scores)
