"""Detections of a whole data set, kept as columns: 300 000 of them are 17 MB, as COCO dictionaries
200.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from regionspot.data.json_reading import (
    FieldError,
    id_array,
    identifier,
    number_column,
    number_rows,
    required,
    shown,
)
from regionspot.errors import InputError
from regionspot.masks import Rle

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, eq=False)
class Detections:
    """M detections of any number of images.

    Args:
        image_ids, category_ids: (M,) ids of the annotation file: int64, or objects where ids are
            text or larger.
        boxes: (M, 4) xyxy in original-image pixels.
        scores: (M,).
        masks: M masks at their image's size, or None. Pairs of one region share one object.

    Raises:
        InputError: columns of different lengths, a score or a box that is not finite.
    """

    image_ids: npt.NDArray[Any]
    category_ids: npt.NDArray[Any]
    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    masks: Sequence[Rle] | None = None

    def __post_init__(self) -> None:
        m = len(self.scores)
        columns = (
            self.image_ids,
            self.category_ids,
            self.boxes,
            *([] if self.masks is None else [self.masks]),
        )
        if any(len(column) != m for column in columns) or self.boxes.shape != (m, 4):
            raise InputError(
                "detections need columns of one length and boxes (M, 4), got "
                f"{[len(column) for column in columns]} beside {m} scores and boxes "
                f"{self.boxes.shape}"
            )
        broken = np.flatnonzero(~np.isfinite(self.scores) | ~np.isfinite(self.boxes).all(1))
        if len(broken):
            first = int(broken[0])
            raise InputError(
                f"detection {first} (image {self.image_ids[first]}) has score {self.scores[first]} "
                f"and box {self.boxes[first].tolist()}; numbers must be finite ({len(broken)} such "
                "detections)"
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
        """From COCO result dictionaries: `image_id`, `category_id`, `bbox` (xywh), `score`, perhaps
        `segmentation`.

        Numbers may be those of NumPy and PyTorch. Masks are kept when every result has one.

        Raises:
            InputError: a field that is missing or has no usable value; the message names the
                result.
        """
        results = list(results)
        try:
            boxes = number_rows(result_fields(results, "bbox"), "bbox", 4, result_name)
            scores = number_column(result_fields(results, "score"), "score", result_name)
            image_ids = id_array(result_fields(results, "image_id", identifier))
            category_ids = id_array(result_fields(results, "category_id", identifier))
        except FieldError as error:
            raise InputError(f"detections: {error}") from error
        boxes[:, 2:] += boxes[:, :2]
        has_masks = bool(results) and all(
            result.get("segmentation") is not None for result in results
        )
        masks = [result["segmentation"] for result in results] if has_masks else None
        return cls(image_ids, category_ids, boxes, scores, masks)

    def to_coco(self) -> list[dict[str, Any]]:
        """As COCO result dictionaries, ready for `json.dump`."""
        columns = zip(
            self.image_ids.tolist(),
            self.category_ids.tolist(),
            self.xywh.tolist(),
            self.scores.tolist(),
            strict=True,
        )
        results = [
            dict(zip(("image_id", "category_id", "bbox", "score"), row, strict=True))
            for row in columns
        ]
        for result, mask in zip(results, self.masks or (), strict=False):
            result["segmentation"] = mask
        return results

    @property
    def xywh(self) -> npt.NDArray[np.float64]:
        """(M, 4) boxes as COCO writes them: x, y, width, height."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)

    def __len__(self) -> int:
        return len(self.scores)


def _as_it_is(value: Any, _: str) -> Any:
    return value


def result_fields(
    results: Sequence[Any], key: str, read: Callable[[Any, str], ValueT] = _as_it_is
) -> list[ValueT]:
    """One field of every result, by way of `read(value, key)`.

    Raises:
        FieldError: a result that is no dictionary, lacks the key, or whose value cannot be read.
    """
    found = []
    for index, result in enumerate(results):
        if not isinstance(result, Mapping):
            raise FieldError(
                f"{result_name(index)}: must be an object with fields, not {shown(result)}"
            )
        try:
            found.append(read(required(result, key), key))
        except FieldError as error:
            raise FieldError(f"{result_name(index)}: {error}") from error
    return found


def result_name(index: int) -> str:
    """How errors call a result."""
    return f"result {index}"
