"""Average precision of detections by LVIS's or COCO's rules.

hotcoco matches and accumulates; the figures are read off its precision table here, as lvis-api and
pycocotools read theirs, so that every group of classes (rare, common, frequent, base, novel) is one
more mean over the same table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from regionspot.data.coco_json import Annotation, Category, CocoDataset, ImageRecord
from regionspot.data.json_reading import FieldError, Id, id_key, id_order, identifier, shown
from regionspot.errors import InputError, RegionSpotError, first_few
from regionspot.evaluation.detections import Detections
from regionspot.masks import Rle

try:
    import hotcoco
except ImportError as error:
    raise RegionSpotError("evaluation needs hotcoco: pip install 'regionspot[eval]'") from error

from regionspot.evaluation.segmentations import annotations_of, as_rle, ground_truth_masks

Rules = Literal["lvis", "coco"]
IouType = Literal["bbox", "segm"]
Figures = dict[str, float | None]

MAX_DETECTIONS: dict[Rules, str] = {"lvis": "300 per image", "coco": "100 per image and class"}
LVIS_MAX_DETECTIONS = 300

_AREAS = {"APs": 1, "APm": 2, "APl": 3}  # the table's last axis; 0 is every size
_THRESHOLDS = {"AP50": 0, "AP75": 5}  # its first: 0.50 to 0.95 in steps of 0.05


def evaluate_detections(
    dataset: CocoDataset,
    detections: Detections | Iterable[Mapping[str, Any]],
    rules: Rules = "lvis",
    iou_type: IouType = "bbox",
) -> Figures:
    """Average precision in percent; None where a group has no class with ground truth.

    By LVIS's rules detections of a class that an image neither shows nor lists as absent are not
    judged, and the image's 300 best are kept. LVIS knows no crowd regions: by its rules one is an
    object like any other, as in lvis-api. By COCO's rules every class is judged on every image,
    crowd regions are neither hit nor missed, and the 100 best of each image and class are kept.

    Args:
        dataset: the ground truth.
        detections: columns, or COCO result dictionaries.
        rules: whose protocol.
        iou_type: overlap of boxes or of masks. The size classes go by the detection's own box or
            mask area.

    Returns:
        AP (IoU 0.50 to 0.95), AP50, AP75, APs, APm, APl (area below 32², to 96², above), APr, APc,
        APf (rare, common and frequent classes), AP_base, AP_novel (classes not marked and marked
        novel in the annotation file).

    Raises:
        InputError: unknown images or classes, a field of a result that has no usable value, boxes
            of negative size, masks that are missing, damaged or not of their image's size where
            masks are judged, LVIS's rules on a file without `neg_category_ids`, an unknown rule or
            IoU type.
    """
    return _figures(_precision(dataset, detections, rules, iou_type), dataset.categories)


def average_precision_by_class(
    dataset: CocoDataset,
    detections: Detections | Iterable[Mapping[str, Any]],
    rules: Rules = "lvis",
    iou_type: IouType = "bbox",
) -> dict[str, float | None]:
    """AP of each class by its name, in percent; None of one without ground truth. As
    `evaluate_detections`.

    Classes that share a name are told apart by their ids: "mug (id 7)".
    """
    everything = _precision(dataset, detections, rules, iou_type)[..., 0]  # (10, 101, V)
    shared = {
        name for name, count in Counter(c.name for c in dataset.categories).items() if count > 1
    }
    names = [f"{c.name} (id {c.id})" if c.name in shared else c.name for c in dataset.categories]
    return {name: _mean(everything[..., index]) for index, name in enumerate(names)}


def _precision(
    dataset: CocoDataset,
    detections: Detections | Iterable[Mapping[str, Any]],
    rules: Rules,
    iou_type: IouType,
) -> npt.NDArray[np.float64]:
    """(10 thresholds, 101 recalls, V classes, 4 areas); -1 where there is nothing to judge."""
    check_ground_truth(dataset, rules, iou_type)
    columns = detections if isinstance(detections, Detections) else Detections.from_coco(detections)
    ranks = _Ranks(dataset)
    ground_truth = hotcoco.COCO(_ground_truth(dataset, ranks, rules, iou_type))
    results = _results(ground_truth, dataset, columns, ranks, iou_type)
    evaluation = hotcoco.COCOeval(ground_truth, results, iou_type, lvis_style=rules == "lvis")
    evaluation.evaluate()
    evaluation.accumulate()
    assert evaluation.eval is not None
    precision: npt.NDArray[np.float64] = evaluation.eval["precision"][..., -1]
    return precision


class _Ranks:
    """Stands in for ids of any size and kind, which hotcoco keeps in float64: their ranks, from 1.

    Ranks follow the order of ids, in which equal scores are judged.
    """

    def __init__(self, dataset: CocoDataset) -> None:
        self._path = dataset.path
        self.images = _ranked([image.id for image in dataset.images])
        self.categories = _ranked([category.id for category in dataset.categories])

    def of(self, ids: npt.NDArray[Any], what: str) -> npt.NDArray[np.int64]:
        """(M,) ranks of the ids of "images" or "categories". Raises InputError for unknown ones."""
        known = self.images if what == "images" else self.categories
        listed = ids.tolist()
        try:
            keys = {one: id_key(identifier(one, f"ids of {what}")) for one in set(listed)}
        except FieldError as error:
            raise InputError(f"detections: {error}") from error
        unknown = sorted((one for one, key in keys.items() if key not in known), key=id_order)
        if unknown:
            raise InputError(
                f"detections name {what} that {self._path} does not list: ids "
                f"{first_few(map(shown, unknown))}."
            )
        return np.fromiter((known[keys[one]] for one in listed), np.int64, len(listed))


def _ranked(ids: list[Id]) -> dict[Id, int]:
    return {id_key(one): rank for rank, one in enumerate(sorted(ids, key=id_order), start=1)}


def check_ground_truth(dataset: CocoDataset, rules: Rules, iou_type: IouType) -> None:
    """Whether the data set can be judged by these rules: the errors of `evaluate_detections` that
    need no detections.

    Raises:
        InputError: LVIS's rules on a file without `neg_category_ids`, masks to be judged on a file
            without usable ones, an unknown rule or IoU type.
    """
    _check_choice("rules", rules, get_args(Rules))
    _check_choice("iou_type", iou_type, get_args(IouType))
    if rules == "lvis":
        for image in dataset.images:
            if image.neg_category_ids is None:
                raise InputError(
                    f"{dataset.path}: image {shown(image.id)} has no neg_category_ids, so LVIS's "
                    "rules cannot tell a wrong detection from one that was never judged. Use "
                    "COCO's rules (--rules coco), or list for every image the classes that it "
                    "does not show."
                )
    if iou_type == "segm":
        ground_truth_masks(dataset)


def _figures(precision: npt.NDArray[np.float64], categories: tuple[Category, ...]) -> Figures:
    everything = precision[..., 0]  # (10, 101, V)
    figures: Figures = {"AP": _mean(everything)}
    figures |= {name: _mean(everything[index]) for name, index in _THRESHOLDS.items()}
    figures |= {name: _mean(precision[..., index]) for name, index in _AREAS.items()}
    for frequency in "rcf":
        figures[f"AP{frequency}"] = _mean(
            everything[..., [c.frequency == frequency for c in categories]]
        )
    novel = np.array([category.novel for category in categories], bool)
    figures["AP_base"] = _mean(everything[..., ~novel])
    figures["AP_novel"] = _mean(everything[..., novel])
    return figures


def _mean(precision: npt.NDArray[np.float64]) -> float | None:
    """In percent, over classes that have ground truth: the others' entries are -1."""
    judged = precision[precision > -1]
    return 100 * float(judged.mean()) if judged.size else None


def _ground_truth(
    dataset: CocoDataset, ranks: _Ranks, rules: Rules, iou_type: IouType
) -> dict[str, Any]:
    """The data set as the dictionary that its file was, with the annotations numbered from 1: 0
    means unmatched.
    """
    masks = ground_truth_masks(dataset) if iou_type == "segm" else None
    return {
        "images": [_image_entry(image, ranks, rules) for image in dataset.images],
        "annotations": [
            _annotation_entry(
                index + 1, annotation, ranks, rules, None if masks is None else masks[index]
            )
            for index, annotation in enumerate(annotations_of(dataset))
        ],
        "categories": [
            {"id": ranks.categories[id_key(c.id)], "name": c.name}
            | ({"frequency": c.frequency} if c.frequency else {})
            for c in dataset.categories
        ],
    }


def _image_entry(image: ImageRecord, ranks: _Ranks, rules: Rules) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": ranks.images[id_key(image.id)],
        "width": image.width,
        "height": image.height,
    }
    if rules == "lvis":
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            entry[key] = [ranks.categories[id_key(one)] for one in getattr(image, key) or ()]
    return entry


def _annotation_entry(
    number: int, annotation: Annotation, ranks: _Ranks, rules: Rules, mask: Rle | None
) -> dict[str, Any]:
    x0, y0, x1, y1 = annotation.box
    entry: dict[str, Any] = {
        "id": number,
        "image_id": ranks.images[id_key(annotation.image_id)],
        "category_id": ranks.categories[id_key(annotation.category_id)],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": annotation.area,
        "iscrowd": int(annotation.iscrowd and rules == "coco"),
    }
    return entry if mask is None else entry | {"segmentation": mask}


def _results(
    ground_truth: hotcoco.COCO,
    dataset: CocoDataset,
    detections: Detections,
    ranks: _Ranks,
    iou_type: IouType,
) -> hotcoco.COCO:
    image_ranks = ranks.of(detections.image_ids, "images")
    category_ranks = ranks.of(detections.category_ids, "categories")
    xywh = detections.xywh
    if (xywh[:, 2:] < 0).any():
        first = int(np.flatnonzero((xywh[:, 2:] < 0).any(1))[0])
        raise InputError(
            f"detection {first} has a box of negative size: {detections.boxes[first].tolist()} "
            "(xyxy)"
        )
    if iou_type == "bbox" and len(detections):
        rows = np.column_stack([image_ranks, xywh, detections.scores, category_ranks])  # (M, 7)
        return ground_truth.load_res(rows)
    masks = _detected_masks(dataset, detections, image_ranks) if iou_type == "segm" else []
    columns = zip(
        image_ranks.tolist(),
        category_ranks.tolist(),
        detections.scores.tolist(),
        masks,
        strict=True,
    )
    # without a box, a result's area is its mask's
    names = ("image_id", "category_id", "score", "segmentation")
    return ground_truth.load_res([dict(zip(names, row, strict=True)) for row in columns])


def _detected_masks(
    dataset: CocoDataset, detections: Detections, image_ranks: npt.NDArray[np.int64]
) -> list[Rle]:
    """The M masks, each object checked once."""
    if detections.masks is None:
        if not len(detections):
            return []
        raise InputError(
            "masks are to be judged but not all detections have one: predict them with masks."
        )
    ordered = sorted(dataset.images, key=lambda image: id_order(image.id))
    sides = {rank: (image.height, image.width) for rank, image in enumerate(ordered, start=1)}
    checked: dict[tuple[int, int], Rle] = {}
    found = []
    for index, (mask, rank) in enumerate(zip(detections.masks, image_ranks.tolist(), strict=True)):
        key = rank, id(mask)
        if key not in checked:
            try:
                checked[key] = as_rle(mask, *sides[rank])
            except FieldError as error:
                raise InputError(f"detections: result {index}: {error}") from error
        found.append(checked[key])
    return found


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {what} {value!r}: choose from {', '.join(choices)}")
