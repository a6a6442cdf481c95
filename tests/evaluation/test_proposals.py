"""Regions from annotations and from a detector's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.proposals import ground_truth_proposals, load_proposals


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    def annotation(number: int, image_id: int, bbox: list[float], iscrowd: int = 0) -> dict[str, Any]:
        return {"id": number, "image_id": image_id, "category_id": 1, "bbox": bbox, "iscrowd": iscrowd}

    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in (4, 2, 9)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            annotation(1, 4, [1, 2, 3, 4]),
            annotation(2, 4, [0, 0, 40, 30], iscrowd=1),
            annotation(3, 4, [-5, 20, 10, 20]),
            annotation(4, 2, [3, 3, 0, 5]),
            annotation(5, 2, [40, 0, 5, 5]),
        ],
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    return CocoDataset.load(path, check_images=False)


def test_ground_truth_leaves_out_crowds_and_boxes_without_pixels(dataset: CocoDataset) -> None:
    proposals = ground_truth_proposals(dataset)
    np.testing.assert_array_equal(proposals.boxes[4], [[1, 2, 4, 6], [-5, 20, 5, 40]])
    assert proposals.boxes[2].shape == proposals.boxes[9].shape == (0, 4)
    assert (proposals.num_dropped, proposals.num_regions, proposals.scores) == (2, 2, None)


def test_detector_results_keep_their_order_within_an_image(dataset: CocoDataset, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    results = [
        {"image_id": 9, "bbox": [1, 1, 5, 5], "score": 0.2, "category_id": 77},
        {"image_id": 4, "bbox": [0, 0, 9, 9], "score": 0.5},
        {"image_id": 9, "bbox": [2, 2, 5, 5], "score": 0.9},
        {"image_id": 9, "bbox": [90, 2, 5, 5], "score": 0.9},
    ]
    path.write_text(json.dumps(results))
    proposals = load_proposals(path, dataset)
    assert proposals.scores is not None
    np.testing.assert_array_equal(proposals.boxes[9], [[1, 1, 6, 6], [2, 2, 7, 7]])
    np.testing.assert_array_equal(proposals.scores[9], [0.2, 0.9])
    np.testing.assert_array_equal(proposals.boxes[4], [[0, 0, 9, 9]])
    assert proposals.boxes[2].shape == (0, 4) and proposals.scores[2].shape == (0,)
    assert proposals.num_dropped == 1
    assert proposals.source == "detector boxes of boxes.json"


def test_no_results_at_all(dataset: CocoDataset, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text("[]")
    assert load_proposals(path, dataset).num_regions == 0


RESULT = {"image_id": 4, "bbox": [0, 0, 9, 9], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "no list of COCO-style detection results but a dict"),
        (json.dumps([5]), "no list of COCO-style detection results"),
        (json.dumps([RESULT, {"image_id": 4, "bbox": [0, 0, 9, 9]}]), "has no key 'score'"),
        (json.dumps([RESULT | {"image_id": i} for i in range(20, 28)]), "ids 20, 21, 22, 23, 24 and 3 more"),
        (json.dumps([RESULT, RESULT | {"bbox": [0, 0, float("nan"), 9]}]), "result 1 has bbox"),
        (json.dumps([RESULT | {"bbox": [0, 0, -1, 9]}]), "result 0 has bbox"),
        (json.dumps([RESULT | {"bbox": [0, 0, 1]}]), "no list of COCO-style|four numbers"),
        (json.dumps([RESULT | {"score": None}]), "result 0 has bbox"),
        (json.dumps([RESULT | {"image_id": 4.5}]), "the image_id 4.5 is no integer"),
        (json.dumps([RESULT | {"image_id": "four"}]), "four"),
        (json.dumps([RESULT | {"image_id": 2**70}]), "no list of COCO-style detection results"),
    ],
)
def test_bad_results_are_named(dataset: CocoDataset, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_proposals(path, dataset)


def test_missing_results_are_named(dataset: CocoDataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the proposals .*absent\.json"):
        load_proposals(tmp_path / "absent.json", dataset)
