"""Regions from annotations and from a detector's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.proposals import Proposals, ground_truth_proposals, load_proposals


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    def annotation(
        number: int, image_id: int, bbox: list[float], iscrowd: int = 0
    ) -> dict[str, Any]:
        return {
            "id": number,
            "image_id": image_id,
            "category_id": 1,
            "bbox": bbox,
            "iscrowd": iscrowd,
        }

    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in (4, 2, 9)
        ],
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
    assert ground_truth_proposals(dataset, crowds=True).num_regions > 2  # LVIS knows no crowds


def test_detector_results_keep_their_order_within_an_image(
    dataset: CocoDataset, tmp_path: Path
) -> None:
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
    assert proposals.source == "detector boxes of boxes.json (COCO results)"


def test_no_results_at_all(dataset: CocoDataset, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text("[]")
    assert load_proposals(path, dataset).num_regions == 0


RESULT = {"image_id": 4, "bbox": [0, 0, 9, 9], "score": 0.5}


def load(content: Any, dataset: CocoDataset) -> Proposals:
    path = dataset.path.parent / "boxes.json"
    path.write_text(json.dumps(content))
    return load_proposals(path, dataset)


def test_boxes_by_image_id_as_the_authors_publish_them(dataset: CocoDataset) -> None:
    content = {
        "9": {"scores": [0.2, 0.9], "labels": [3, 1], "boxes": [[1, 1, 6, 6], [2.5, 2, 7, 7]]},
        "4": {"scores": [], "labels": [], "boxes": []},
    }
    proposals = load(content, dataset)
    assert proposals.scores is not None
    np.testing.assert_array_equal(proposals.boxes[9], [[1, 1, 6, 6], [2.5, 2, 7, 7]])
    np.testing.assert_array_equal(proposals.scores[9], [0.2, 0.9])
    assert len(proposals.boxes[4]) == len(proposals.boxes[2]) == 0
    assert proposals.source == "detector boxes of boxes.json (boxes by image id, xyxy)"
    assert load({}, dataset).num_regions == 0


def test_both_formats_and_numbers_as_text_are_the_same(dataset: CocoDataset) -> None:
    plain = load([{"image_id": 9, "bbox": [1.5, 1, 5, 5], "score": 0.25}], dataset)
    for content in (
        [{"image_id": "9", "bbox": ["1.5", " 1", "5.0", "5"], "score": "0.25"}],
        [{"image_id": 9.0, "bbox": [1.5, 1, 5, 5], "score": 0.25}],
        {"9": {"boxes": [["1.5", 1, 6.5, 6]], "scores": ["0.25"]}},
    ):
        other = load(content, dataset)
        assert plain.scores is not None and other.scores is not None
        np.testing.assert_array_equal(plain.boxes[9], other.boxes[9])
        np.testing.assert_array_equal(plain.scores[9], other.scores[9])


def named(tmp_path: Path, images: dict[Any, str]) -> CocoDataset:
    """A data set of images with these ids and file names."""
    records = [
        {"id": i, "file_name": name, "width": 40, "height": 30} for i, name in images.items()
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"images": records, "annotations": [], "categories": []}))
    return CocoDataset.load(path, check_images=False)


@pytest.mark.parametrize(
    ("spelled", "expected", "named_by"),
    [
        ([7, "10"], [7, 10], ""),
        (["007", "0010"], [7, 10], "ids with leading zeros"),
        (["val/a.jpg", "val/b.jpg"], [7, 10], "file names"),
        (["b.jpg", "a.jpg"], [10, 7], "file names"),
        (["b", "a"], [10, 7], "file names without ending"),
        (["val/b", "a"], [10, 7], "file names without ending"),
    ],
)
def test_images_may_be_named_by_their_files(
    tmp_path: Path, spelled: list[Any], expected: list[int], named_by: str
) -> None:
    dataset = named(tmp_path, {7: "val/a.jpg", 10: "val/b.jpg"})
    content = [
        {"image_id": one, "bbox": [i, 0, 9, 9], "score": 0.5} for i, one in enumerate(spelled)
    ]
    proposals = load(content, dataset)
    assert [proposals.boxes[i][0, 0] for i in expected] == [0, 1]
    assert named_by in proposals.source


def test_images_with_ids_of_any_kind(tmp_path: Path) -> None:
    ids = ("000002b66c9c498e", "1234567890123456", 2**64 + 1, 2**64)
    dataset = named(tmp_path, {one: f"{index}.jpg" for index, one in enumerate(ids)})
    proposals = load(
        {str(one): {"boxes": [[index, 0, 39, 9]], "scores": [1]} for index, one in enumerate(ids)},
        dataset,
    )
    assert [proposals.boxes[one][0, 0] for one in ids] == [0, 1, 2, 3]


def test_names_that_can_mean_two_images_are_refused(tmp_path: Path) -> None:
    content = [
        {"image_id": one, "bbox": [0, 0, 9, 9], "score": 0.5} for one in ("000001", "000002")
    ]
    with pytest.raises(
        InputError,
        match=r"can be ids with leading zeros and file names without ending .* different",
    ):
        load(content, named(tmp_path, {1: "000002.jpg", 2: "000001.jpg"}))
    same = load(content, named(tmp_path, {1: "000001.jpg", 2: "000002.jpg"}))
    assert [len(same.boxes[i]) for i in (1, 2)] == [1, 1]
    with pytest.raises(InputError, match="of another split"):
        load(content[:1], named(tmp_path, {7: "a/000001.jpg", 8: "b/000001.jpg"}))


def test_tiny_negative_sizes_are_zero(dataset: CocoDataset) -> None:
    proposals = load([RESULT | {"bbox": [3, 3, -1e-5, 9]}, RESULT], dataset)
    assert (proposals.num_dropped, proposals.num_regions) == (1, 1)


GLIP = {"4": {"boxes": [[0, 0, 9, 9]], "scores": [0.5]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a": 1},
            "image 'a': must be an object with boxes and scores, not 1. Wanted are COCO results",
        ),
        ({"4": [[1, 2, 3, 4]]}, "image '4': must be an object with boxes and scores"),
        ({"4": {"boxes": [[1, 2, 3, 4]]}}, "image '4': must have a list 'scores', not null"),
        ({"4": {"boxes": [[1, 2, 3, 4]], "scores": []}}, "image '4': has 1 boxes and 0 scores"),
        (
            {"4": {"boxes": [[5, 2, 3, 4]], "scores": [1]}},
            "image '4': box 0: its box has a negative size",
        ),
        (
            {"4": {"boxes": [[1, 2, None, 4]], "scores": [1]}},
            "image '4': box 0: boxes: must be a number, not null",
        ),
        (
            {"4": {"boxes": [[1, 2, 3]], "scores": [1]}},
            "image '4': box 0: boxes: must be a list of 4 numbers",
        ),
        (
            {"4": {"boxes": [[1, 2, 3, 4]], "scores": [3]}},
            "image '4': box 0: score: must be a probability",
        ),
        (GLIP | {"5": GLIP["4"]}, "for images that .* does not list: ids '5'"),
        (
            {"images": [], "annotations": [RESULT]},
            "is an annotation file; a detector's results are wanted",
        ),
        (5, "must be COCO results"),
        ([5], "result 0: must be an object with fields, not 5"),
        ([[RESULT], [RESULT]], "is a list of lists; wanted are COCO results"),
        ([RESULT, {"image_id": 4, "bbox": [0, 0, 9, 9]}], "result 1: has no key 'score'"),
        ([{"bbox": [0, 0, 9, 9], "score": 1}], "result 0: has no key 'image_id'"),
        ([RESULT | {"image_id": i} for i in range(20, 28)], "ids 20, 21, 22, 23, 24 and 3 more"),
        (
            [RESULT, RESULT | {"bbox": [0, 0, float("nan"), 9]}],
            "result 1: bbox: must be a finite number, not nan",
        ),
        ([RESULT | {"bbox": [0, 0, -1, 9]}], "result 0: its box has a negative size"),
        ([RESULT | {"bbox": [0, 0, 1]}], "result 0: bbox: must be a list of 4 numbers, not of 3"),
        ([RESULT | {"bbox": None}], "result 0: bbox: must be a list of 4 numbers, not null"),
        ([RESULT | {"bbox": [0, 0, 1e300, 5]}], "result 0: its box .* is far beyond any picture"),
        ([RESULT | {"score": None}], "result 0: score: must be a number, not null"),
        ([RESULT | {"score": float("nan")}], "result 0: score: must be a finite number, not nan"),
        ([RESULT | {"score": "high"}], "result 0: score: must be a number, not 'high'"),
        ([RESULT | {"score": True}], "result 0: score: must be a number, not true"),
        (
            [RESULT, RESULT | {"score": 97.5}],
            r"result 1: score: must be a probability .* not 97\.5 \(1 such",
        ),
        ([RESULT, RESULT | {"score": -0.5}], "result 1: score: must be a probability"),
        ([RESULT | {"image_id": 4.5}], r"result 0: image_id: must be a whole number, not 4\.5"),
        ([RESULT | {"image_id": None}], "result 0: image_id: must be a whole number, not null"),
        ([RESULT | {"image_id": "four"}], "ids 'four'"),
        ([RESULT | {"image_id": 2**70}], "does not list: ids 1180591620717411303424"),
        (
            [RESULT | {"bbox": [0.1, 0.2, 0.5, 0.7]}],
            "no box reaches further than a pixel .* fractions",
        ),
    ],
)
def test_bad_results_are_named(dataset: CocoDataset, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as found:
        load(content, dataset)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("", "is empty"),
        ('{"image_id": 4}\n{"image_id": 4}', "several JSON values"),
    ],
)
def test_files_that_are_no_json_are_named(
    dataset: CocoDataset, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_proposals(path, dataset)


def test_missing_results_are_named(dataset: CocoDataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the proposals .*absent\.json"):
        load_proposals(tmp_path / "absent.json", dataset)


def test_ids_that_are_file_names_of_other_images_are_refused(tmp_path: Path) -> None:
    images = [{"id": i + 1, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(3)]
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]})
    )
    dataset = CocoDataset.load(path, check_images=False)
    of_image = {"boxes": [[0, 0, 9, 9]], "scores": [0.5]}
    assert load({"0": of_image, "2": of_image}, dataset).boxes[1].shape == (1, 4)  # by file name
    with pytest.raises(InputError, match="are the file names of other images"):
        load({"1": of_image, "2": of_image}, dataset)
    assert load([RESULT | {"image_id": 1}], dataset).boxes[1].shape == (1, 4)
