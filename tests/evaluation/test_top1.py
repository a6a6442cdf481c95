"""Top-1 accuracy, counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regionspot.data.coco_json import CocoDataset
from regionspot.evaluation.proposals import ground_truth_proposals
from regionspot.evaluation.selection import best_labels
from regionspot.evaluation.top1 import is_right, top1_accuracy


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    Image.new("RGB", (200, 200)).save(tmp_path / "a.png")
    areas = [(1, 10.0), (1, 32.0**2), (2, 96.0**2), (3, 96.0**2 + 1)]
    annotations = [
        {"id": n, "image_id": 1, "category_id": category, "bbox": [n, 0, 50, 50], "area": area}
        for n, (category, area) in enumerate(areas, start=1)
    ]
    categories = [
        {"id": 1, "name": "a", "frequency": "f"},
        {"id": 2, "name": "b", "frequency": "r"},
        {"id": 3, "name": "c", "novel": True},
    ]
    image = {"id": 1, "file_name": "a.png", "width": 200, "height": 200}
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps({"images": [image], "annotations": annotations, "categories": categories})
    )
    return CocoDataset.load(path)


def test_groups_are_counted_by_their_regions(dataset: CocoDataset) -> None:
    annotations = ground_truth_proposals(dataset).annotations
    assert annotations is not None
    assert top1_accuracy(
        dataset, annotations, {1: np.array([True, False, True, False])}, {"ab": {1, 2}}
    ) == {
        "top1": 50,
        "top1s": 100,  # the first
        "top1m": 50,  # the second and third
        "top1l": 0,
        "top1r": 100,
        "top1c": None,
        "top1f": 50,
        "top1_base": pytest.approx(200 / 3),
        "top1_novel": 0,
        "top1_ab": pytest.approx(200 / 3),
    }


def test_nothing_judged_is_no_figure(dataset: CocoDataset) -> None:
    annotations = ground_truth_proposals(dataset).annotations
    assert annotations is not None
    assert set(top1_accuracy(dataset, annotations, {}).values()) == {None}


def test_right_is_the_best_word(dataset: CocoDataset) -> None:
    annotations = dataset.annotations_by_image[1]  # of the classes a, a, b, c
    probabilities = np.array([[0.4, 0.3, 0.3], [0.1, 0.8, 0.1], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert is_right(dataset, annotations, probabilities).tolist() == [True, False, False, True]
    twins = replace(
        dataset,
        categories=tuple(replace(c, name="a") if c.id == 2 else c for c in dataset.categories),
    )
    assert twins.class_names == ("a", "c")
    assert is_right(twins, annotations, probabilities[:, [0, 2]]).tolist() == [
        True,
        True,
        True,
        True,
    ]


def test_best_labels_are_one_word_for_each_region_best_first() -> None:
    probabilities = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.4, 0.4, 0.2]])
    regions, classes, scores = best_labels(probabilities, np.arange(3))
    assert (regions.tolist(), classes.tolist(), scores.tolist()) == (
        [1, 0, 2],
        [2, 1, 0],
        [0.8, 0.5, 0.4],
    )
    regions, classes, scores = best_labels(probabilities, np.arange(3), np.array([1.0, 0.1, 1.0]))
    assert (regions.tolist(), classes.tolist()) == ([0, 2, 1], [1, 0, 2])
    assert scores.tolist() == pytest.approx([0.5, 0.4, 0.08])


def test_categories_that_share_the_best_word_are_all_detected() -> None:
    probabilities = np.array([[0.2, 0.8], [0.7, 0.3]])
    regions, classes, scores = best_labels(probabilities, np.array([0, 1, 1]))
    assert (regions.tolist(), classes.tolist(), scores.tolist()) == (
        [0, 0, 1],
        [1, 2, 0],
        [0.8, 0.8, 0.7],
    )
