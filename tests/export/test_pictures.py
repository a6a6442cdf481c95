"""Pictures to try a model on, from each kind of source."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regionspot.errors import InputError
from regionspot.export.pictures import BOXES_OF_A_FOLDER, NUM_WORDS, Pictures, load_pictures
from regionspot.vocabulary import parse_vocabulary


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (60 + index, 40), (index, 0, 0)).save(folder / f"{index}.png")


def check(found: Pictures) -> None:
    for picture in found.pictures:
        height, width = picture.image.shape[:2]
        assert (
            picture.image.dtype == np.uint8
            and picture.boxes.dtype == np.float32
            and len(picture.boxes)
        )
        assert (picture.boxes[:, :2] < picture.boxes[:, 2:]).all()
        assert (picture.boxes >= 0).all() and (
            picture.boxes <= [width, height, width, height]
        ).all()


def test_mini_world() -> None:
    found = load_pictures(None, 3)
    again = load_pictures(None, 3)
    other = load_pictures(None, 3, seed=1)
    check(found)
    assert found.source == "3 scenes of the mini world"
    assert len(found.words) == NUM_WORDS and set(found.words) <= set(parse_vocabulary("mini"))
    assert [picture.image.tobytes() for picture in found.pictures] == [
        one.image.tobytes() for one in again.pictures
    ]
    assert found.pictures[0].image.tobytes() != other.pictures[0].image.tobytes()


def test_annotations(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [5, 5, 10, 20]},
        {"id": 2, "image_id": 1, "category_id": 9, "bbox": [50, 30, 100, 100]},  # reaches outside
        {"id": 3, "image_id": 2, "category_id": 9, "bbox": [0, 0, 0, 0]},  # empty
        {"id": 4, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4]},
    ]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 60 + i, "height": 40} for i in range(4)
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [{"area": 1, **annotation} for annotation in annotations],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    found = load_pictures(tmp_path / "all.json", 10)
    check(found)
    assert found.source == "2 images of all.json" and found.words == ("cat", "dog")
    boxes = {picture.image.shape[1]: picture.boxes.tolist() for picture in found.pictures}
    assert boxes == {61: [[5, 5, 15, 25], [50, 30, 61, 40]], 63: [[1, 2, 4, 6]]}
    assert len(load_pictures(tmp_path / "all.json", 1).pictures) == 1
    (tmp_path / "none.json").write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(InputError, match="no picture with a box"):
        load_pictures(tmp_path / "none.json")


def test_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "deep" / "er", 3)
    (tmp_path / "notes.txt").write_text("not a picture")
    found = load_pictures(tmp_path, 10)
    check(found)
    assert found.source == f"3 images of {tmp_path.name}/" and set(found.words) <= set(
        parse_vocabulary("coco")
    )
    assert all(len(picture.boxes) == BOXES_OF_A_FOLDER for picture in found.pictures)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        load_pictures(tmp_path / "empty")
    with pytest.raises(InputError, match=r"absent\.json"):
        load_pictures(tmp_path / "absent.json")


def test_a_folder_of_a_mac(tmp_path: Path) -> None:
    """Hidden files (._0.png is no picture) and others are passed over with a count; folders below
    are read.
    """
    write_pictures(tmp_path / "photos" / "below", 2)
    for name in ("._0.png", ".DS_Store", "notes.txt"):
        (tmp_path / "photos" / name).write_bytes(b"\0\5\x16\7")
    found = load_pictures(tmp_path / "photos", 5)
    assert found.source == "2 images of photos/ (2 hidden files passed over)"


def test_a_truncated_picture_is_named_with_its_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(content[:60])
    with pytest.raises(InputError, match=f"{tmp_path}/0.png"):
        load_pictures(tmp_path, 1)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"there is no file or folder .*none: name an annotation file, or a folder"
    ):
        load_pictures(tmp_path / "none")
