"""Our figures against the evaluators that define them: lvis-api and pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.average_precision import (
    Figures,
    IouType,
    Rules,
    average_precision_by_class,
    check_ground_truth,
    evaluate_detections,
)
from regionspot.evaluation.detections import Detections
from regionspot.evaluation.segmentations import as_rle
from regionspot.masks import rle_area

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")
RULES: tuple[Rules, ...] = ("lvis", "coco")


def results_for(iou_type: str, detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is customarily given to the references: for masks no boxes, so that a result's area is
    its mask's.
    """
    dropped = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    return [
        {key: value for key, value in copy.deepcopy(d).items() if key != dropped}
        for d in detections
    ]


def lvis_figures(
    path: Path, detections: list[dict[str, Any]], iou_type: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Figures, np.ndarray]:
    """lvis-api's summary in percent, and its AP of each class (V,), NaN without ground truth."""
    from lvis import LVIS, LVISEval, LVISResults

    monkeypatch.setattr(np, "float", float, raising=False)  # gone from numpy since lvis 0.5.3
    ground_truth = LVIS(str(path))
    evaluation = LVISEval(
        ground_truth, LVISResults(ground_truth, results_for(iou_type, detections)), iou_type
    )
    evaluation.run()
    figures = {name: percent(evaluation.results[name]) for name in (*NAMES, "APr", "APc", "APf")}
    return figures, class_precision(evaluation.eval["precision"][..., 0])


def coco_figures(
    path: Path, detections: list[dict[str, Any]], iou_type: str
) -> tuple[Figures, np.ndarray]:
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(path))
        evaluation = COCOeval(
            ground_truth, ground_truth.loadRes(results_for(iou_type, detections)), iou_type
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {name: percent(value) for name, value in zip(NAMES, evaluation.stats, strict=False)}
    return figures, class_precision(evaluation.eval["precision"][..., 0, -1])


def percent(value: float) -> float | None:
    return None if value == -1 else 100 * float(value)


def class_precision(precision: np.ndarray) -> np.ndarray:
    """(10, 101, V) to (V,)."""
    return np.array(
        [np.nan if (table == -1).all() else table.mean() for table in precision.transpose(2, 0, 1)]
    )


def assert_same(actual: Figures, expected: Figures) -> None:
    for name, value in expected.items():
        assert actual[name] == (None if value is None else pytest.approx(value, abs=1e-9)), name


def assert_base_and_novel(actual: Figures, dataset: CocoDataset, precision: np.ndarray) -> None:
    novel = np.array([category.novel for category in dataset.categories])
    assert actual["AP_base"] == pytest.approx(100 * np.nanmean(precision[~novel]), abs=1e-9)
    assert actual["AP_novel"] == pytest.approx(100 * np.nanmean(precision[novel]), abs=1e-9)


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@pytest.mark.parametrize("seed", range(6))
def test_lvis_rules_equal_lvis_api(
    make_data: Callable[..., Any], seed: int, iou_type: IouType, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(seed)
    expected, precision = lvis_figures(data.path, data.detections, iou_type, monkeypatch)
    actual = evaluate_detections(data.dataset, data.detections, "lvis", iou_type)
    assert_same(actual, expected)
    assert_base_and_novel(actual, data.dataset, precision)


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@pytest.mark.parametrize("seed", range(6))
def test_coco_rules_equal_pycocotools(
    make_data: Callable[..., Any], seed: int, iou_type: IouType
) -> None:
    data = make_data(seed)
    expected, precision = coco_figures(data.path, data.detections, iou_type)
    actual = evaluate_detections(data.dataset, data.detections, "coco", iou_type)
    assert_same(actual, expected)
    assert_base_and_novel(actual, data.dataset, precision)


def test_limits_of_detections_equal_the_references(
    make_data: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(20, num_images=4, detections_per_object=150)
    counts = np.bincount([detection["image_id"] for detection in data.detections])
    # more than LVIS's 300 of an image, and COCO's 100 of an image and class
    assert counts.max() > 450
    assert_same(
        evaluate_detections(data.dataset, data.detections, "lvis"),
        lvis_figures(data.path, data.detections, "bbox", monkeypatch)[0],
    )
    assert_same(
        evaluate_detections(data.dataset, data.detections, "coco"),
        coco_figures(data.path, data.detections, "bbox")[0],
    )


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_no_detections_score_zero(
    make_data: Callable[..., Any], rules: Rules, iou_type: IouType
) -> None:
    figures = evaluate_detections(make_data(1).dataset, [], rules, iou_type)
    assert set(figures.values()) == {0.0}


@pytest.mark.parametrize("rules", RULES)
def test_perfect_detections_score_hundred(make_data: Callable[..., Any], rules: Rules) -> None:
    dataset = make_data(2).dataset
    annotations = [a for of_image in dataset.annotations_by_image.values() for a in of_image]
    detections = Detections(
        np.array([a.image_id for a in annotations]),
        np.array([a.category_id for a in annotations]),
        np.array([a.box for a in annotations]),
        np.ones(len(annotations)),
    )
    figures = evaluate_detections(dataset, detections, rules)
    assert all(value == pytest.approx(100) for value in figures.values()), figures


def test_groups_without_ground_truth_are_none(make_data: Callable[..., Any]) -> None:
    data = make_data(3)
    content = json.loads(data.path.read_text())
    for category in content["categories"]:
        category.pop("frequency")
        category.pop("novel")
    data.path.write_text(json.dumps(content))
    figures = evaluate_detections(
        CocoDataset.load(data.path, check_images=False), data.detections, "coco"
    )
    assert [figures[name] for name in ("APr", "APc", "APf", "AP_novel")] == [None] * 4
    assert figures["AP_base"] == figures["AP"] != 0


def test_annotation_id_zero_counts(make_data: Callable[..., Any]) -> None:
    data = make_data(4)
    expected = evaluate_detections(data.dataset, data.detections)
    content = json.loads(data.path.read_text())
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    data.path.write_text(json.dumps(content))
    assert (
        evaluate_detections(CocoDataset.load(data.path, check_images=False), data.detections)
        == expected
    )


def test_detections_survive_the_round_trip(make_data: Callable[..., Any]) -> None:
    data = make_data(5)
    again = Detections.from_coco(Detections.from_coco(data.detections).to_coco())
    assert evaluate_detections(data.dataset, again, "lvis", "segm") == evaluate_detections(
        data.dataset, data.detections, "lvis", "segm"
    )
    halves = Detections.concatenate([again, Detections.from_coco([])])
    assert len(halves) == len(data.detections)


def test_bad_detections_are_named(make_data: Callable[..., Any]) -> None:
    data = make_data(6)
    good = data.detections[0]
    with pytest.raises(InputError, match=r"images that .* does not list: ids 99"):
        evaluate_detections(data.dataset, [good | {"image_id": 99}])
    with pytest.raises(InputError, match=r"categories that .* does not list: ids 5"):
        evaluate_detections(data.dataset, [good | {"category_id": 5}])
    with pytest.raises(InputError, match="numbers must be finite"):
        Detections(np.array([1]), np.array([2]), np.zeros((1, 4)), np.array([np.nan]))
    with pytest.raises(InputError, match="not all detections have one"):
        evaluate_detections(data.dataset, results_for("bbox", [good]), iou_type="segm")
    with pytest.raises(InputError, match="unknown rules 'pascal': choose from lvis, coco"):
        evaluate_detections(data.dataset, [good], "pascal")  # type: ignore[arg-type]


def test_unfit_ground_truth_is_named(make_data: Callable[..., Any]) -> None:
    data = make_data(7)
    content = json.loads(data.path.read_text())
    del content["images"][0]["neg_category_ids"], content["annotations"][0]["segmentation"]
    data.path.write_text(json.dumps(content))
    dataset = CocoDataset.load(data.path, check_images=False)
    with pytest.raises(InputError, match=r"image 1 has no neg_category_ids.*--rules coco"):
        evaluate_detections(dataset, data.detections, "lvis")
    with pytest.raises(InputError, match="annotation 1 has no segmentation"):
        evaluate_detections(dataset, data.detections, "coco", "segm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": float("nan")}, "result 1: score: must be a finite number, not nan"),
        ({"score": None}, "result 1: score: must be a number, not null"),
        ({"score": True}, "result 1: score: must be a number, not true"),
        ({"bbox": [1, 2, 3]}, "result 1: bbox: must be a list of 4 numbers, not of 3"),
        ({"bbox": None}, "result 1: bbox: must be a list of 4 numbers, not null"),
        ({"bbox": np.array([1, np.inf, 3, 4])}, "result 1: bbox: must be a finite number, not inf"),
        ({"bbox": [9, 9, -3, 4]}, "detection 1 has a box of negative size"),
        ({"image_id": 1.5}, "result 1: image_id: must be a whole number, not 1.5"),
        ({"category_id": [2]}, "result 1: category_id: must be a whole number"),
        ({"category_id": "2x"}, "categories that .* does not list: ids '2x'"),
        ({"image_id": 2**70}, "images that .* does not list: ids 1180591620717411303424"),
    ],
)
def test_bad_fields_of_results_are_named(
    make_data: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    data = make_data(6, num_images=3)
    with pytest.raises(InputError, match=message):
        evaluate_detections(data.dataset, [data.detections[0], data.detections[1] | changes])


def test_results_that_are_no_results_are_named(make_data: Callable[..., Any]) -> None:
    dataset = make_data(6, num_images=1).dataset
    with pytest.raises(InputError, match="result 0: must be an object with fields, not 5"):
        evaluate_detections(dataset, [5])  # type: ignore[list-item]
    with pytest.raises(InputError, match="result 0: has no key 'bbox'"):
        evaluate_detections(dataset, [{"image_id": 1}])


def test_results_may_hold_numbers_of_numpy_and_torch(make_data: Callable[..., Any]) -> None:
    data = make_data(8, num_images=4)
    strange = [
        {
            "image_id": np.int64(d["image_id"]),
            "category_id": torch.tensor(d["category_id"]),
            "bbox": torch.tensor(d["bbox"], dtype=torch.float64),
            "score": np.float64(d["score"]),
        }
        for d in data.detections
    ]
    plain = [
        {key: d[key] for key in ("image_id", "category_id", "bbox", "score")}
        for d in data.detections
    ]
    assert Detections.from_coco(strange).to_coco() == Detections.from_coco(plain).to_coco()
    json.dumps(Detections.from_coco(strange).to_coco())
    assert evaluate_detections(data.dataset, strange) == evaluate_detections(data.dataset, plain)


@pytest.mark.parametrize(
    "respell",
    [
        lambda i: 2**53 + i,
        lambda i: 2**64 + i,
        lambda i: -(2**70) + i,
        lambda i: f"{i:016x}",
        lambda i: f"{2**62 + i}",
    ],
)
def test_ids_of_any_size_and_kind_give_the_same_figures(
    make_data: Callable[..., Any], respell: Callable[[int], Any]
) -> None:
    data = make_data(9, num_images=8)
    content = json.loads(data.path.read_text())
    for image in content["images"]:
        image["id"] = respell(image["id"])
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[key] = [respell(one) for one in image[key]]
    for entry in (*content["annotations"], *content["categories"]):
        entry |= {
            key: respell(entry[key]) for key in ("id", "image_id", "category_id") if key in entry
        }
    data.path.write_text(json.dumps(content))
    dataset = CocoDataset.load(data.path, check_images=False)
    detections = [
        d | {key: respell(d[key]) for key in ("image_id", "category_id")} for d in data.detections
    ]
    for rules, iou_type in zip(RULES, IOU_TYPES, strict=True):
        expected = evaluate_detections(data.dataset, data.detections, rules, iou_type)
        assert evaluate_detections(dataset, detections, rules, iou_type) == expected
    again = Detections.from_coco(detections).to_coco()
    assert [d["image_id"] for d in again] == [d["image_id"] for d in detections]


def test_results_find_ids_that_are_spelled_in_another_way(make_data: Callable[..., Any]) -> None:
    data = make_data(10, num_images=6)
    as_text = [
        d | {"image_id": str(d["image_id"]), "category_id": float(d["category_id"])}
        for d in data.detections
    ]
    assert evaluate_detections(data.dataset, as_text) == evaluate_detections(
        data.dataset, data.detections
    )


def test_polygons_and_run_lengths_equal_pycocotools(make_data: Callable[..., Any]) -> None:
    data = make_data(11)
    content = json.loads(data.path.read_text())
    for number, annotation in enumerate(content["annotations"]):
        x, y, width, height = annotation["bbox"]
        if annotation["iscrowd"]:
            runs = np.diff(
                [
                    0,
                    *np.flatnonzero(np.diff(mask_api.decode(annotation["segmentation"]).ravel("F")))
                    + 1,
                ]
            )
            annotation["segmentation"]["counts"] = [*runs.tolist(), 160 * 200 - int(runs.sum())]
        elif number % 2:
            triangle = [x, y, x + width, y, x + width / 2, y + height]
            annotation["segmentation"] = [triangle, [x, y, x + width, y + height, x, y + height]]
    data.path.write_text(json.dumps(content))
    expected, _ = coco_figures(data.path, data.detections, "segm")
    dataset = CocoDataset.load(data.path, check_images=False)
    assert_same(evaluate_detections(dataset, data.detections, "coco", "segm"), expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[]], "no polygon has three points or more"),
        ([[5, 5]], "no polygon has three points or more"),
        ([[5, 5, 9, 9]], "no polygon has three points or more"),
        ([5, 5, 9, 9], "no polygon has three points or more"),
        ([[5, 5, 9, 9, 5, 9, 7]], "even count of numbers, x and y, not 7"),
        ([[5, 5, 9, float("nan"), 5, 9]], "must be a finite number, not nan"),
        ([[5, 5, 9, None, 5, 9]], "must be a number, not null"),
        ([[5, 5, 1e9, 5, 5, 9]], "reaches far beyond the picture of 200 x 160"),
        ([[[5, 5], [9, 5], [5, 9]]], "even count of numbers|must be a number"),
        ("oSX1;P7", "must be a list of polygons or an RLE object, not 'oSX1;P7'"),
        (5, "must be a list of polygons or an RLE object, not 5"),
        (
            {"size": [200, 160], "counts": "PX4"},
            r"its size \[200, 160\] is not the picture's \[160, 200\]",
        ),
        ({"size": [160], "counts": "PX4"}, r"its size \[160\] is not the picture's"),
        ({"counts": "PX4"}, "its size null is not the picture's"),
        ({"size": [160, 200]}, "counts: must be run lengths, compressed or a list, not null"),
        ({"size": [160, 200], "counts": "zzz"}, "damaged RLE mask"),
        ({"size": [160, 200], "counts": "\u00e9"}, "counts: must be run lengths"),
        ({"size": [160, 200], "counts": [5, 9]}, "sum to the picture's 32000 pixels, not to 14"),
        ({"size": [160, 200], "counts": [32005, -5]}, "must be 0 or more"),
        ({"size": [160, 200], "counts": [1.5]}, "counts: must be a whole number, not 1.5"),
    ],
)
def test_masks_that_cannot_be_judged_are_named(
    make_data: Callable[..., Any], segmentation: Any, message: str
) -> None:
    data = make_data(7, num_images=3)
    content = json.loads(data.path.read_text())
    content["annotations"][0]["segmentation"] = segmentation
    data.path.write_text(json.dumps(content))
    dataset = CocoDataset.load(data.path, check_images=False)
    with pytest.raises(
        InputError, match=rf"1 of \d+ annotations have no usable mask: annotation 1: .*{message}"
    ):
        check_ground_truth(dataset, "coco", "segm")
    # boxes can still be judged
    assert evaluate_detections(dataset, data.detections, "coco")["AP"] is not None
    if isinstance(segmentation, dict):
        with pytest.raises(InputError, match=rf"detections: result 1: .*{message}"):
            changed = [data.detections[0], data.detections[1] | {"segmentation": segmentation}]
            evaluate_detections(data.dataset, changed, "coco", "segm")


def test_thin_polygons_beside_a_whole_one_add_nothing_and_a_flat_list_is_a_polygon() -> None:
    square = [5, 5, 15, 5, 15, 15, 5, 15]
    expected = as_rle([square], 20, 30)
    assert as_rle([square, [], [2, 2], [1, 1, 9, 9]], 20, 30) == expected
    assert as_rle(square, 20, 30) == as_rle([[str(one) for one in square]], 20, 30) == expected
    assert rle_area(expected) == 100
    assert as_rle({"size": ["20", 30.0], "counts": expected["counts"].encode()}, 20, 30) == expected
    assert rle_area(as_rle([[100, 100, 110, 100, 110, 110]], 20, 30)) == 0


def test_classes_of_one_name_are_told_apart_by_their_ids(make_data: Callable[..., Any]) -> None:
    data = make_data(12, num_images=8)
    content = json.loads(data.path.read_text())
    for category in content["categories"][:2]:
        category["name"] = "twin"
    data.path.write_text(json.dumps(content))
    dataset = CocoDataset.load(data.path, check_images=False)
    assert evaluate_detections(dataset, data.detections) == evaluate_detections(
        data.dataset, data.detections
    )
    by_class = average_precision_by_class(dataset, data.detections)
    assert list(by_class)[:3] == ["twin (id 2)", "twin (id 3)", "thing 4"] and len(by_class) == 7
