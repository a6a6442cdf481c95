"""Annotation files, good and bad."""

from __future__ import annotations

import copy
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regionspot.data.coco_json import CocoDataset, _spare_ids
from regionspot.data.json_reading import id_key
from regionspot.errors import InputError, first_few

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
    assert [image.file_name for image in dataset.images] == [
        "b/seven.jpg",
        "http://images.cocodataset.org/val2017/000000000003.jpg",
    ]
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


def named(*names: str) -> dict[str, Any]:
    """A file whose images have these names."""
    images = [
        {"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)
    ]
    return {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}


@pytest.mark.parametrize(
    "name",
    [
        "val/a b.jpg",
        "val\\a b.jpg",
        "C:\\Users\\someone\\val\\a b.jpg",
        "\\\\server\\share\\val\\a b.jpg",
        "/home/someone/data/val/a b.jpg",
        "https://host/bucket/val/a%20b.jpg?X-Amz-Expires=3600#x",
        "s3://bucket/val/a b.jpg",
        "/data/local-files/?d=val/a%20b.jpg",
        "/data/local-files/?d=val\\a b.jpg",
        "http://host:8080/data/local-files/?d=val/a%20b.jpg",
    ],
)
def test_names_of_other_systems_are_found(tmp_path: Path, name: str) -> None:
    picture = tmp_path / "val" / "a b.jpg"
    picture.parent.mkdir()
    picture.touch()
    dataset = CocoDataset.load(write(tmp_path, named(name)))
    assert dataset.image_path(dataset.images[0]) == picture
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / picture.name).touch()
    flattened = CocoDataset.load(dataset.path, flat, check_images=False)
    found = flattened.image_path(flattened.images[0])
    assert found.is_file() == (name not in ("val/a b.jpg", "val\\a b.jpg"))


def test_a_folder_is_listed_once_and_new_files_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{index}.jpg" for index in range(200)]
    for name in names[:-1]:
        (tmp_path / name).touch()
    asked: list[str] = []
    isfile = os.path.isfile

    def noted(path: str) -> bool:
        asked.append(path)
        return isfile(path)

    monkeypatch.setattr("os.path.isfile", noted)
    path = write(tmp_path, named(*names))
    with pytest.raises(
        InputError, match=r"1 of 200 images are not under .*: 199\.jpg\. Put them there"
    ):
        CocoDataset.load(path)
    assert len(asked) < 25
    dataset = CocoDataset.load(path, check_images=False)
    assert not dataset.image_path(dataset.images[-1]).exists()
    (tmp_path / names[-1]).touch()
    dataset.check_images()


@pytest.mark.parametrize(
    "names",
    [
        ("a.png", "a.png"),
        ("a.png", "./a.png"),
        ("job1/a.png", "job1//a.png"),
        ("https://host/x/a.png", "https://host/y/a.png"),
        ("a.png", "C:\\pics\\a.png"),
    ],
)
def test_two_images_of_one_file_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "job1").mkdir()
    for name in ("a.png", "job1/a.png"):
        (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=r"the images 0 \(.*\) and 1 \(.*\) are both the file .*a\.png"
    ):
        CocoDataset.load(write(tmp_path, named(*names)))


def test_a_relative_name_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "img.jpg").touch()
    with pytest.raises(
        InputError, match=r"2 of 2 images .* lie directly in that folder, .* correct file_name"
    ):
        CocoDataset.load(write(tmp_path, named("job1/img.jpg", "job2/img.jpg")))


def test_a_relative_name_may_begin_with_the_roots_own_folders(tmp_path: Path) -> None:
    (tmp_path / "pics" / "val").mkdir(parents=True)
    (tmp_path / "pics" / "val" / "0.jpg").touch()
    (tmp_path / "pics" / "val" / "1.jpg").touch()
    dataset = CocoDataset.load(
        write(tmp_path, named("val/0.jpg", "pics/val/1.jpg")), tmp_path / "pics" / "val"
    )
    assert [dataset.image_path(image).name for image in dataset.images] == ["0.jpg", "1.jpg"]
    with pytest.raises(InputError, match="1 of 1 images"):
        CocoDataset.load(write(tmp_path, named("train/0.jpg")), tmp_path / "pics" / "val")


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"2 of 2 images .* b/seven.jpg, http.*000003.jpg.*image root.*--images"
    ):
        CocoDataset.load(write(tmp_path, CONTENT))
    with pytest.raises(InputError, match="There is no such folder"):
        CocoDataset.load(write(tmp_path, CONTENT), tmp_path / "absent")
    with pytest.raises(InputError) as found:
        CocoDataset.load(write(tmp_path, named("[" * 5000, "line\nbreak.png")))
    assert len(str(found.value)) < 1000 and "\n" not in str(found.value)
    (tmp_path / "a.png").touch()
    with pytest.raises(
        InputError, match=r"1 of 2 images are not under .*: b\.png\. Put them there, or"
    ):
        CocoDataset.load(write(tmp_path, named("a.png", "b.png")))


def test_a_name_that_is_not_utf_8_is_a_file(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    dataset = CocoDataset.load(write(tmp_path, named(name)))
    assert dataset.image_path(dataset.images[0]).is_file()
    with pytest.raises(InputError, match=r"gone\\udce9\.jpg") as found:
        CocoDataset.load(write(tmp_path, named(name, "gone\udce9.jpg")))
    str(found.value).encode()


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
        (lambda content: content.update(images={}), r"'images' must be a list, not \{\}"),
        (
            lambda content: content.update(annotations=None),
            "'annotations' must be a list, not null",
        ),
        (
            lambda content: content["images"].append(5),
            r"images\[2\] must be an object with fields, not 5",
        ),
        (remove("images", 0, "width"), "image 7 has no key 'width'"),
        (remove("images", 0, "id"), r"images\[0\] has no key 'id'"),
        (remove("images", 0, "file_name"), "image 7 has no key 'file_name'"),
        (change("images", 0, file_name=5), "image 7: file_name: must be text, not 5"),
        (change("images", 0, file_name="a\0.jpg"), "image 7: file_name: .* NUL"),
        (change("images", 0, file_name="a\ud83d.jpg"), "image 7: file_name: .* surrogate"),
        (change("images", 0, height=0), "image 7: height: must be 1 to 1000000 pixels, not 0"),
        (change("images", 0, width=None), "image 7: width: must be a whole number, not null"),
        (change("images", 0, width=40.5), r"image 7: width: must be a whole number, not 40\.5"),
        (change("images", 0, width=True), "image 7: width: must be a whole number, not true"),
        (change("images", 0, width="wide"), "image 7: width: must be a whole number, not 'wide'"),
        (change("images", 0, id=None), r"images\[0\]: id: must be a whole number, not null"),
        (change("images", 0, id=" "), "image ' ': id: must be text"),
        (change("images", 0, id=[7]), r"images\[0\]: id: must be a whole number, not \[7\]"),
        (change("images", 0, id=2.0**60), r"images\[0\]: id: .* has lost digits as a float"),
        (change("images", 1, id=7), "images share the ids 7"),
        (change("images", 1, id="7"), "images share the ids 7"),
        (
            change("images", 1, neg_category_ids=[4]),
            "image 3: neg_category_ids: there is no category 4",
        ),
        (change("images", 1, neg_category_ids="5"), "image 3: neg_category_ids: must be a list"),
        (change("categories", 0, name=" "), "category 9: name: must be text, not ' '"),
        (change("categories", 0, name=None), "category 9: name: must be text, not null"),
        (change("categories", 0, name=7), "category 9: name: must be text, not 7"),
        (
            change("categories", 0, name="cup\ud83d"),
            "category 9: name: .* holds half a surrogate pair",
        ),
        (change("categories", 0, frequency="x"), "category 9: frequency: must be 'r', 'c' or 'f'"),
        (
            change("categories", 0, frequency=["r"]),
            "category 9: frequency: must be 'r', 'c' or 'f'",
        ),
        (change("categories", 0, novel="perhaps"), "category 9: novel: must be true or false"),
        (change("categories", 0, id=5), "categories share the ids 5"),
        (remove("annotations", 1, "bbox"), "annotation 2 has no key 'bbox'"),
        (
            change("annotations", 0, bbox=[1, 2, float("nan"), 4]),
            "annotation 1: bbox: must be a finite number, not nan",
        ),
        (
            change("annotations", 0, bbox=[1, 2, float("inf"), 4]),
            "annotation 1: bbox: must be a finite number",
        ),
        (
            change("annotations", 0, bbox=[1, 2, "nan", 4]),
            "annotation 1: bbox: must be a number, not 'nan'",
        ),
        (
            change("annotations", 0, bbox=[1, 2, "1_0", 4]),
            "annotation 1: bbox: must be a number, not '1_0'",
        ),
        (
            change("annotations", 0, bbox=[1, 2, True, 4]),
            "annotation 1: bbox: must be a number, not true",
        ),
        (
            change("annotations", 0, bbox=[1, 2, 10**400, 4]),
            "annotation 1: bbox: must be a finite number",
        ),
        (
            change("annotations", 0, bbox=[1, 2, 1e30, 4]),
            "annotation 1: bbox: .* far beyond any picture",
        ),
        (
            change("annotations", 0, bbox=[1, 2, -3, 4]),
            "annotation 1: bbox: width and height must be 0 or more",
        ),
        (
            change("annotations", 0, bbox=[1, 2, 3]),
            "annotation 1: bbox: must be a list of 4 numbers, not of 3",
        ),
        (
            change("annotations", 0, bbox=[]),
            "annotation 1: bbox: must be a list of 4 numbers, not of 0",
        ),
        (
            change("annotations", 0, bbox=None),
            "annotation 1: bbox: must be a list of 4 numbers, not null",
        ),
        (
            change("annotations", 0, bbox={"x": 1}),
            "annotation 1: bbox: must be a list of 4 numbers",
        ),
        (change("annotations", 0, area=-1), "annotation 1: area: must be 0 or more, not -1"),
        (change("annotations", 0, area="big"), "annotation 1: area: must be a number, not 'big'"),
        (
            change("annotations", 0, iscrowd=2),
            "annotation 1: iscrowd: must be true or false, 1 or 0, not 2",
        ),
        (
            change("annotations", 0, iscrowd="no"),
            "annotation 1: iscrowd: must be true or false, 1 or 0, not 'no'",
        ),
        (change("annotations", 0, isgroupof="x"), "annotation 1: isgroupof: must be true or false"),
        (change("annotations", 0, image_id=8), "annotation 1: image_id: there is no image 8"),
        (
            change("annotations", 0, image_id=7.5),
            r"annotation 1: image_id: must be a whole number, not 7\.5",
        ),
        (
            change("annotations", 0, image_id="007"),
            "annotation 1: image_id: there is no image '007'",
        ),
        (
            change("annotations", 0, category_id=8),
            "annotation 1: category_id: there is no category 8",
        ),
        (
            change("annotations", 0, category_id=True),
            "annotation 1: category_id: must be a whole number, not true",
        ),
        (
            change("annotations", 0, id=1e999),
            r"annotations\[0\]: id: must be a whole number, not inf",
        ),
        (
            change("annotations", 0, id=False),
            r"annotations\[0\]: id: must be a whole number, not false",
        ),
        (change("annotations", 0, id=2), "annotations share the ids 2"),
    ],
)
def test_bad_content_is_named(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = copy.deepcopy(CONTENT)
    spoil(content)
    with pytest.raises(InputError, match=message) as found:
        CocoDataset.load(write(tmp_path, content), check_images=False)
    assert "\n" not in str(found.value)


def respelled(value: Any, spell: Callable[[Any], Any]) -> Any:
    """A document with every number spelled in another way."""
    if isinstance(value, dict):
        return {key: respelled(one, spell) for key, one in value.items()}
    if isinstance(value, list):
        return [respelled(one, spell) for one in value]
    return spell(value) if isinstance(value, int | float) else value


@pytest.mark.parametrize("spell", [float, lambda n: str(n).lower(), lambda n: f" {float(n)} "])
def test_numbers_may_be_floats_or_text(tmp_path: Path, spell: Callable[[Any], Any]) -> None:
    plain = CocoDataset.load(write(tmp_path, CONTENT), check_images=False)
    content = respelled({key: CONTENT[key] for key in ("images", "categories")}, spell)
    annotations = [dict(one, segmentation=None) for one in CONTENT["annotations"]]
    content["annotations"] = respelled(annotations, spell)
    other = CocoDataset.load(write(tmp_path, content), check_images=False)
    assert [id_key(image.id) for image in other.images] == [image.id for image in plain.images]
    assert [(c.name, c.novel, c.frequency) for c in other.categories] == [
        ("cat", True, "f"),
        ("mug", False, "r"),
    ]
    for image, twin in zip(plain.images, other.images, strict=True):
        assert (image.width, image.height) == (twin.width, twin.height)
        for one, two in zip(
            plain.annotations_by_image[image.id], other.annotations_by_image[twin.id], strict=True
        ):
            assert (one.box, one.area, one.iscrowd) == (two.box, two.area, two.iscrowd)
            assert (id_key(two.id), id_key(two.category_id)) == (one.id, one.category_id)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, False), ("0", False), ("false", False), ("False", False), (None, False), (0.0, False)]
    + [(1, True), ("1", True), ("true", True), (True, True)],
)
def test_truth_values(tmp_path: Path, value: Any, expected: bool) -> None:
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["iscrowd"] = content["categories"][0]["novel"] = value
    content["annotations"][1] |= {"iscrowd": 0, "IsGroupOf": value}
    dataset = CocoDataset.load(write(tmp_path, content), check_images=False)
    assert [a.iscrowd for a in dataset.annotations_by_image[7]] == [expected, expected]
    assert dataset.categories[1].novel == expected


@pytest.mark.parametrize(
    "ids",
    [
        (2**53, 2**53 + 1),
        (2**64 + 1, 2**64),
        (10**30, -(10**30)),
        (-1, 0),
        ("000002b66c9c498e", "00000e1234567890"),
        ("1234567890123456", "0234567890123456"),
        ("a3f1-00c2", "001"),
        (1, "001"),
    ],
)
def test_ids_of_any_size_and_kind(tmp_path: Path, ids: tuple[Any, Any]) -> None:
    content = copy.deepcopy(CONTENT)
    for image, annotation, category, own in zip(
        *(content[key] for key in ("images", "annotations", "categories")), ids, strict=True
    ):
        image["id"] = annotation["image_id"] = category["id"] = annotation[
            "category_id"
        ] = annotation["id"] = own
    content["images"][1]["neg_category_ids"] = [ids[0]]
    dataset = CocoDataset.load(write(tmp_path, content), check_images=False)
    assert [image.id for image in dataset.images] == list(ids)
    assert [[a.id for a in dataset.annotations_by_image[i]] for i in ids] == [[ids[0]], [ids[1]]]
    assert {category.id: category.name for category in dataset.categories} == {
        ids[0]: "mug",
        ids[1]: "cat",
    }
    assert dataset.images[1].neg_category_ids == (ids[0],)


def test_annotations_without_ids_are_numbered(tmp_path: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["annotations"] += [
        dict(content["annotations"][0]),
        dict(content["annotations"][0], id="x"),
    ]
    del content["annotations"][2]["id"]
    content["annotations"][0]["id"] = None
    dataset = CocoDataset.load(write(tmp_path, content), check_images=False)
    assert [a.id for a in dataset.annotations_by_image[7]] == [3, 2, 4, "x"]


def test_optional_fields_may_be_null_and_tiny_negative_sizes_are_zero(tmp_path: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["annotations"][0] |= {
        "area": None,
        "segmentation": None,
        "iscrowd": None,
        "bbox": [1, 2, -0.0001, 20],
    }
    content["images"][1] |= {"neg_category_ids": None, "file_name": None}
    content["categories"][0] |= {"frequency": None, "novel": None}
    dataset = CocoDataset.load(write(tmp_path, content), check_images=False)
    first = dataset.annotations_by_image[7][0]
    assert (first.box, first.area, first.segmentation, first.iscrowd) == (
        (1, 2, 1, 22),
        0,
        None,
        False,
    )
    assert dataset.images[1].neg_category_ids is None and dataset.images[1].file_name.startswith(
        "http"
    )


def test_categories_of_one_name_share_a_word(tmp_path: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["categories"] += [{"id": 0, "name": "mug"}, {"id": 12, "name": "dog"}]
    dataset = CocoDataset.load(write(tmp_path, content), check_images=False)
    assert dataset.class_names == ("mug", "cat", "dog")
    assert dataset.category_index == {0: 0, 5: 1, 9: 0, 12: 2}


def test_boxes_as_fractions_of_the_picture_are_refused(tmp_path: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["bbox"] = [0.1, 0.2, 0.5, 0.75]
    content["annotations"][1]["bbox"] = [0.5, 0.5, 0.5, 0.51]
    with pytest.raises(
        InputError, match=r"annotations: no box reaches further than a pixel .* fractions"
    ):
        CocoDataset.load(write(tmp_path, content), check_images=False)
    content["annotations"][1]["bbox"] = [1, 1, 20, 20]
    assert CocoDataset.load(write(tmp_path, content), check_images=False).num_annotations == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    content = copy.deepcopy(CONTENT)
    content["categories"][0]["name"] = "joëlette 猫"
    path = tmp_path / "annotations.json"
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert CocoDataset.load(path, check_images=False).class_names == ("cat", "joëlette 猫")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', r"annotations\.json is not JSON \(.*ends in the middle"),
        ('{"images": [{"file_name": "a.j', r"is not JSON \(.*ends in the middle"),
        ("", "is empty. A COCO or LVIS annotation file is wanted"),
        (" \n", "is empty"),
        ("[1, 2]", "is no COCO or LVIS annotation file but a list"),
        ("{}\n{}\n", r"is not JSON \(Extra data.*several JSON values one after another"),
        (
            "caf\xe9".encode("latin-1"),
            r"is not UTF-8 text \(byte 0xe9 at position 3\): save it as UTF-8",
        ),
        (gzip.compress(b"{}"), "is compressed: unpack it first"),
        ("[" * 100_000, "is nested too deeply"),
        (
            f'{{"images": [], "annotations": [], "categories": [{"1" * 5000}]}}',
            "a number in it has thousands of digits",
        ),
        (
            '{"images": [], "images": [], "annotations": [], "categories": []}',
            "the key 'images' twice",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "id": 2, "name": "a"}]}',
            "the key 'id' twice",
        ),
        ('{"images": [], "annotations": [{"caption": "a cat"}]}', "has no list categories"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as found:
        CocoDataset.load(path)
    assert "\n" not in str(found.value) and len(str(found.value)) < 500


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the annotation file .*No such file"):
        CocoDataset.load(tmp_path / "absent.json")
    with pytest.raises(InputError, match=r"cannot read the annotation file .*Is a directory"):
        CocoDataset.load(tmp_path)


def test_first_few() -> None:
    assert first_few([]) == ""
    assert first_few("ab") == "a, b"
    assert first_few(range(8)) == "0, 1, 2, 3, 4 and 3 more"


def test_names_that_were_saved_as_the_url_is_written(tmp_path: Path) -> None:
    names = ["https://h/p/a%20b.jpg", "https://h/p/x.jpg?v=2", "s3://bucket/img#1.jpg"]
    for name in ("a%20b.jpg", "x.jpg?v=2", "img#1.jpg"):
        (tmp_path / name).touch()
    dataset = CocoDataset.load(write(tmp_path, named(*names)))
    found = [dataset.image_path(image).name for image in dataset.images]
    assert found == ["a%20b.jpg", "x.jpg?v=2", "img#1.jpg"]


def test_annotations_without_an_id_get_one_that_is_free() -> None:
    assert next(_spare_ids([{"id": 1.0}, {}, {"id": 7.0}, {"id": "3"}, {"id": None}])) == 8


def test_groups_that_nobody_has_looked_for(tmp_path: Path) -> None:
    content = named("a.jpg")
    boxes = [
        {"id": i, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5], "IsGroupOf": i - 1}
        for i in range(3)
    ]
    dataset = CocoDataset.load(
        write(tmp_path, content | {"annotations": boxes}), check_images=False
    )
    assert [annotation.iscrowd for annotation in dataset.annotations_by_image[0]] == [
        False,
        False,
        True,
    ]
