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
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.average_precision import Figures, IouType, Rules, evaluate_detections
from regionspot.evaluation.detections import Detections

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")
RULES: tuple[Rules, ...] = ("lvis", "coco")


def results_for(iou_type: str, detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is customarily given to the references: for masks no boxes, so that a result's area is its mask's."""
    dropped = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    return [{key: value for key, value in copy.deepcopy(d).items() if key != dropped} for d in detections]


def lvis_figures(
    path: Path, detections: list[dict[str, Any]], iou_type: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Figures, np.ndarray]:
    """lvis-api's summary in percent, and its AP of each class (V,), NaN without ground truth."""
    from lvis import LVIS, LVISEval, LVISResults

    monkeypatch.setattr(np, "float", float, raising=False)  # gone from numpy since lvis 0.5.3
    ground_truth = LVIS(str(path))
    evaluation = LVISEval(ground_truth, LVISResults(ground_truth, results_for(iou_type, detections)), iou_type)
    evaluation.run()
    figures = {name: percent(evaluation.results[name]) for name in (*NAMES, "APr", "APc", "APf")}
    return figures, class_precision(evaluation.eval["precision"][..., 0])


def coco_figures(path: Path, detections: list[dict[str, Any]], iou_type: str) -> tuple[Figures, np.ndarray]:
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(path))
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(results_for(iou_type, detections)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {name: percent(value) for name, value in zip(NAMES, evaluation.stats, strict=False)}
    return figures, class_precision(evaluation.eval["precision"][..., 0, -1])


def percent(value: float) -> float | None:
    return None if value == -1 else 100 * float(value)


def class_precision(precision: np.ndarray) -> np.ndarray:
    """(10, 101, V) to (V,)."""
    return np.array([np.nan if (table == -1).all() else table.mean() for table in precision.transpose(2, 0, 1)])


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
def test_coco_rules_equal_pycocotools(make_data: Callable[..., Any], seed: int, iou_type: IouType) -> None:
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
    assert counts.max() > 450  # more than LVIS's 300 of an image, and COCO's 100 of an image and class
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
def test_no_detections_score_zero(make_data: Callable[..., Any], rules: Rules, iou_type: IouType) -> None:
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
    figures = evaluate_detections(CocoDataset.load(data.path, check_images=False), data.detections, "coco")
    assert [figures[name] for name in ("APr", "APc", "APf", "AP_novel")] == [None] * 4
    assert figures["AP_base"] == figures["AP"] != 0


def test_annotation_id_zero_counts(make_data: Callable[..., Any]) -> None:
    data = make_data(4)
    expected = evaluate_detections(data.dataset, data.detections)
    content = json.loads(data.path.read_text())
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    data.path.write_text(json.dumps(content))
    assert evaluate_detections(CocoDataset.load(data.path, check_images=False), data.detections) == expected


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
        evaluate_detections(data.dataset, [good | {"score": float("nan")}])
    with pytest.raises(InputError, match="the detections have none"):
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
