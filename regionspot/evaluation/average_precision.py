"""Average precision of detections by LVIS's or COCO's rules.

hotcoco matches and accumulates; the figures are read off its precision table here, as lvis-api and pycocotools read
theirs, so that every group of classes (rare, common, frequent, base, novel) is one more mean over the same table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from regionspot.data.coco_json import Annotation, Category, CocoDataset, ImageRecord, first_few
from regionspot.errors import InputError, RegionSpotError
from regionspot.evaluation.detections import Detections

try:
    import hotcoco
except ImportError as error:
    raise RegionSpotError("evaluation needs hotcoco: pip install 'regionspot[eval]'") from error

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

    By LVIS's rules detections of a class that an image neither shows nor lists as absent are not judged, and the
    image's 300 best are kept. LVIS knows no crowd regions: by its rules one is an object like any other, as in
    lvis-api. By COCO's rules every class is judged on every image, crowd regions are neither hit nor missed, and the
    100 best of each image and class are kept.

    Args:
        dataset: the ground truth.
        detections: columns, or COCO result dictionaries.
        rules: whose protocol.
        iou_type: overlap of boxes or of masks. The size classes go by the detection's own box or mask area.

    Returns:
        AP (IoU 0.50 to 0.95), AP50, AP75, APs, APm, APl (area below 32², to 96², above), APr, APc, APf (rare, common
        and frequent classes), AP_base, AP_novel (classes not marked and marked novel in the annotation file).

    Raises:
        InputError: unknown images or classes, no masks where masks are judged, LVIS's rules on a file without
            `neg_category_ids`, an unknown rule or IoU type.
    """
    return _figures(_precision(dataset, detections, rules, iou_type), dataset.categories)


def average_precision_by_class(
    dataset: CocoDataset,
    detections: Detections | Iterable[Mapping[str, Any]],
    rules: Rules = "lvis",
    iou_type: IouType = "bbox",
) -> dict[str, float | None]:
    """AP of each class by its name, in percent; None of one without ground truth. As `evaluate_detections`."""
    everything = _precision(dataset, detections, rules, iou_type)[..., 0]  # (10, 101, V)
    return {category.name: _mean(everything[..., index]) for index, category in enumerate(dataset.categories)}


def _precision(
    dataset: CocoDataset, detections: Detections | Iterable[Mapping[str, Any]], rules: Rules, iou_type: IouType
) -> npt.NDArray[np.float64]:
    """(10 thresholds, 101 recalls, V classes, 4 areas); -1 where there is nothing to judge."""
    check_ground_truth(dataset, rules, iou_type)
    columns = detections if isinstance(detections, Detections) else Detections.from_coco(detections)
    _check_detections(dataset, columns, iou_type)
    ground_truth = hotcoco.COCO(_ground_truth(dataset, rules, iou_type))
    results = _results(ground_truth, columns, iou_type)
    evaluation = hotcoco.COCOeval(ground_truth, results, iou_type, lvis_style=rules == "lvis")
    evaluation.evaluate()
    evaluation.accumulate()
    assert evaluation.eval is not None
    precision: npt.NDArray[np.float64] = evaluation.eval["precision"][..., -1]
    return precision


def check_ground_truth(dataset: CocoDataset, rules: Rules, iou_type: IouType) -> None:
    """Whether the data set can be judged by these rules: the errors of `evaluate_detections` that need no detections.

    Raises:
        InputError: LVIS's rules on a file without `neg_category_ids`, masks to be judged on a file without them, an
            unknown rule or IoU type.
    """
    _check_choice("rules", rules, get_args(Rules))
    _check_choice("iou_type", iou_type, get_args(IouType))
    if rules == "lvis":
        for image in dataset.images:
            if image.neg_category_ids is None:
                raise InputError(
                    f"{dataset.path}: image {image.id} has no neg_category_ids, so LVIS's rules cannot tell a wrong "
                    "detection from one that was never judged. Use COCO's rules (--rules coco), or list for every "
                    "image the classes that it does not show."
                )
    if iou_type == "segm":
        for annotation in _annotations(dataset):
            if annotation.segmentation is None:
                raise InputError(
                    f"{dataset.path}: annotation {annotation.id} has no segmentation, so masks cannot be judged. "
                    "Evaluate boxes alone (--iou-type bbox), or add the masks."
                )


def _figures(precision: npt.NDArray[np.float64], categories: tuple[Category, ...]) -> Figures:
    everything = precision[..., 0]  # (10, 101, V)
    figures: Figures = {"AP": _mean(everything)}
    figures |= {name: _mean(everything[index]) for name, index in _THRESHOLDS.items()}
    figures |= {name: _mean(precision[..., index]) for name, index in _AREAS.items()}
    for frequency in "rcf":
        figures[f"AP{frequency}"] = _mean(everything[..., [c.frequency == frequency for c in categories]])
    novel = np.array([category.novel for category in categories], bool)
    figures["AP_base"] = _mean(everything[..., ~novel])
    figures["AP_novel"] = _mean(everything[..., novel])
    return figures


def _mean(precision: npt.NDArray[np.float64]) -> float | None:
    """In percent, over classes that have ground truth: the others' entries are -1."""
    judged = precision[precision > -1]
    return 100 * float(judged.mean()) if judged.size else None


def _ground_truth(dataset: CocoDataset, rules: Rules, iou_type: IouType) -> dict[str, Any]:
    """The data set as the dictionary that its file was, with the annotations numbered from 1: 0 means unmatched."""
    return {
        "images": [_image_entry(image, rules) for image in dataset.images],
        "annotations": [
            _annotation_entry(number, annotation, rules, iou_type)
            for number, annotation in enumerate(_annotations(dataset), start=1)
        ],
        "categories": [
            {"id": c.id, "name": c.name} | ({"frequency": c.frequency} if c.frequency else {})
            for c in dataset.categories
        ],
    }


def _annotations(dataset: CocoDataset) -> Iterator[Annotation]:
    return (a for image in dataset.images for a in dataset.annotations_by_image[image.id])


def _image_entry(image: ImageRecord, rules: Rules) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": image.id, "width": image.width, "height": image.height}
    if rules == "lvis":
        entry["neg_category_ids"] = list(image.neg_category_ids or ())
        entry["not_exhaustive_category_ids"] = list(image.not_exhaustive_category_ids or ())
    return entry


def _annotation_entry(number: int, annotation: Annotation, rules: Rules, iou_type: IouType) -> dict[str, Any]:
    x0, y0, x1, y1 = annotation.box
    entry: dict[str, Any] = {
        "id": number,
        "image_id": annotation.image_id,
        "category_id": annotation.category_id,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": annotation.area,
        "iscrowd": int(annotation.iscrowd and rules == "coco"),
    }
    if iou_type == "segm":
        entry["segmentation"] = annotation.segmentation
    return entry


def _results(ground_truth: hotcoco.COCO, detections: Detections, iou_type: IouType) -> hotcoco.COCO:
    if iou_type == "bbox" and len(detections):
        rows = np.column_stack(
            [detections.image_ids, detections.xywh, detections.scores, detections.category_ids]
        )  # (M, 7)
        return ground_truth.load_res(rows)
    results = detections.to_coco()
    for result in results:  # without its box, a result's area is its mask's
        del result["bbox"]
    return ground_truth.load_res(results)


def _check_detections(dataset: CocoDataset, detections: Detections, iou_type: IouType) -> None:
    for what, ids, known in (
        ("images", detections.image_ids, [image.id for image in dataset.images]),
        ("categories", detections.category_ids, [category.id for category in dataset.categories]),
    ):
        unknown = np.setdiff1d(ids, known).tolist()
        if unknown:
            raise InputError(f"detections name {what} that {dataset.path} does not list: ids {first_few(unknown)}.")
    if iou_type == "segm" and len(detections) and detections.masks is None:
        raise InputError("masks are to be judged but the detections have none: predict them with masks.")


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {what} {value!r}: choose from {', '.join(choices)}")
