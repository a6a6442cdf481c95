"""Annotation files, good and bad."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regionspot.data.coco_json import CocoDataset, first_few
from regionspot.errors import InputError

CONTENT: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "b/seven.jpg", "width": 40, "height": 30},
        {
            "id": 3,
            "coco_url": "http://images.cocodataset.org/val2017/000000000003.jpg",
            "width": 20,
            "height": 10,
            "neg_category_ids": [5],
            "not_exhaustive_category_ids": [],
        },
    ],
    "categories": [
        {"id": 9, "name": "mug", "frequency": "r"},
        {"id": 5, "name": "cat", "frequency": "f", "novel": True},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 7,
            "category_id": 9,
            "bbox": [1, 2, 10.5, 20],
            "area": 99,
            "segmentation": [[0, 0, 1, 1]],
        },
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 4, 5], "iscrowd": 1},
    ],
}


def write(directory: Path, content: Any) -> Path:
    path = directory / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def test_records(tmp_path: Path) -> None:
    dataset = CocoDataset.load(write(tmp_path, CONTENT), check_images=False)
    assert dataset.class_names == ("cat", "mug")
    assert dataset.category_index == {5: 0, 9: 1}
    assert [(c.frequency, c.novel) for c in dataset.categories] == [("f", True), ("r", False)]
    assert [image.file_name for image in dataset.images] == ["b/seven.jpg", "val2017/000000000003.jpg"]
    assert [image.neg_category_ids for image in dataset.images] == [None, (5,)]
    first, second = dataset.annotations_by_image[7]
    assert first.box == (1, 2, 11.5, 22)
    assert (first.area, first.segmentation, first.iscrowd) == (99, [[0, 0, 1, 1]], False)
    assert (second.area, second.segmentation, second.iscrowd) == (20, None, True)
    assert dataset.annotations_by_image[3] == ()
    assert dataset.num_annotations == 2
    assert dataset.image_root == tmp_path


def test_images_are_found_below_the_root_or_flat_in_it(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    (root / "b").mkdir(parents=True)
    (root / "b" / "seven.jpg").touch()
    (root / "000000000003.jpg").touch()
    dataset = CocoDataset.load(write(tmp_path, CONTENT), root)
    assert [dataset.image_path(image).relative_to(root).as_posix() for image in dataset.images] == [
        "b/seven.jpg",
        "000000000003.jpg",
    ]


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 of 2 images .* b/seven.jpg, val2017/000000000003.jpg.*image root"):
        CocoDataset.load(write(tmp_path, CONTENT))


def test_empty_lists_are_a_data_set(tmp_path: Path) -> None:
    dataset = CocoDataset.load(write(tmp_path, {"images": [], "annotations": [], "categories": []}))
    assert (dataset.images, dataset.class_names, dataset.num_annotations) == ((), (), 0)


def change(key: str, index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key][index].update(values)


def remove(key: str, index: int, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key][index].pop(name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("categories"), "no list categories"),
        (lambda content: content.update(images={}), "'images' must be a list"),
        (lambda content: content["images"].append(5), r"images\[2\]"),
        (remove("images", 0, "width"), "image 7 has no key 'width'"),
        (remove("images", 0, "file_name"), "image 7 has no key 'file_name'"),
        (change("images", 0, height=0), "image 7: width and height must be 1 pixel or more"),
        (change("images", 1, id=7), "images share the ids 7"),
        (change("images", 1, neg_category_ids=[4]), "image 3 lists the unknown categories 4"),
        (change("categories", 0, name=" "), "category 9: name must be a word"),
        (change("categories", 0, frequency="x"), "category 9: frequency must be 'r', 'c' or 'f'"),
        (change("categories", 0, id=5), "categories share the ids 5"),
        (remove("annotations", 1, "bbox"), "annotation 2 has no key 'bbox'"),
        (remove("annotations", 1, "id"), r"annotations\[1\] has no key 'id'"),
        (change("annotations", 0, bbox=[1, 2, float("nan"), 4]), "annotation 1: bbox must be finite"),
        (change("annotations", 0, bbox=[1, 2, -3, 4]), "annotation 1: bbox must be finite"),
        (change("annotations", 0, bbox=[1, 2, 3]), "annotation 1: not enough values"),
        (change("annotations", 0, bbox=None), "annotation 1: "),
        (change("annotations", 0, image_id=8), "annotation 1 is of image 8, which is not there"),
        (change("annotations", 0, category_id=8), "annotation 1 is of category 8, which is not there"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    content = copy.deepcopy(CONTENT)
    spoil(content)
    with pytest.raises(InputError, match=message):
        CocoDataset.load(write(tmp_path, content), check_images=False)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the annotation file .*No such file"):
        CocoDataset.load(tmp_path / "absent.json")
    path = tmp_path / "broken.json"
    path.write_text('{"images": [')
    with pytest.raises(InputError, match=r"broken\.json is not JSON"):
        CocoDataset.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(InputError, match="no list annotations, categories, images"):
        CocoDataset.load(path)


def test_first_few() -> None:
    assert first_few([]) == ""
    assert first_few("ab") == "a, b"
    assert first_few(range(8)) == "0, 1, 2, 3, 4 and 3 more"
