"""What is learnt from an annotation file, the batches of each step, padding, and augmentation."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regionspot.data.augmentation import CropFlip
from regionspot.data.collate import RegionLimit, pad_regions
from regionspot.data.dataset import (
    MISSING,
    BatchSchedule,
    TrainingSet,
    describe_left_out,
    load_training_set,
    step_seed,
)
from regionspot.errors import InputError
from regionspot.transforms import resize_image

RECIPE = CropFlip(0.5, 0.5, (400, 500, 600), (384, 600))


def write(directory: Path, boxes: list[tuple[int, int, list[float], dict[str, Any]]]) -> Path:
    """Three images of 40 x 30 with (image, category, xywh, more) annotations; category 3 is
    novel.
    """
    for index in range(3):
        Image.new("RGB", (40, 30)).save(directory / f"{index}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(3)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": 1, **more}
            for i, (image, category, box, more) in enumerate(boxes)
        ],
        "categories": [
            {"id": 7, "name": "cup"},
            {"id": 3, "name": "new", "novel": True},
            {"id": 5, "name": "cat"},
        ],
    }
    path = directory / "train.json"
    path.write_text(json.dumps(content))
    return path


def test_only_usable_regions_are_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            (2, 7, [1, 2, 10, 10], {}),
            (0, 3, [1, 2, 10, 10], {}),  # novel
            (2, 5, [30, 20, 50, 50], {}),  # clipped
            (2, 5, [40, 0, 5, 5], {}),  # outside
            (2, 5, [4, 0, 0, 5], {}),  # empty
            (1, 5, [4, 0, 9, 9], {"iscrowd": 1}),
            (1, 5, [5, 6, 7, 8], {}),
        ],
    )
    found = load_training_set("d", path, exclude="novel")
    assert found.class_names == ("cat", "cup")  # in the order of ids, without the novel class
    assert found.file_names == ("1.png", "2.png")
    assert found.counts.tolist() == [1, 2] and found.offsets.tolist() == [0, 1, 3]
    assert found.class_ids.tolist() == [0, 1, 0]
    assert found.boxes.tolist() == [[5, 6, 12, 14], [1, 2, 11, 12], [30, 20, 40, 30]]
    assert found.sizes.tolist() == [[30, 40], [30, 40]]
    assert found.left_out == {
        "images without a usable region": 1,
        "regions of excluded classes": 1,
        "crowd regions (iscrowd)": 1,
        "boxes without area in the image": 2,
    }
    assert found.notes == ("1 of 3 categories are excluded (exclude: novel)",)
    assert describe_left_out(found.left_out).startswith(
        "left out 1 images without a usable region, 1 regions of"
    )
    assert found.region_indices(np.array([1, 0, 1])).tolist() == [1, 2, 0, 1, 2]
    assert found.region_indices(np.array([], np.int64)).tolist() == []
    second = found.select(np.array([1]))
    assert (second.file_names, second.class_ids.tolist(), second.counts.tolist()) == (
        ("2.png",),
        [1, 0],
        [2],
    )
    assert second.boxes.tolist() == found.boxes[1:].tolist()


def test_classes_marked_novel_are_trained_on_unless_excluded(tmp_path: Path) -> None:
    """V3Det marks half of its categories by this very key."""
    path = write(tmp_path, [(0, 3, [1, 2, 10, 10], {}), (1, 5, [5, 6, 7, 8], {})])
    found = load_training_set("d", path)
    assert (found.class_names, found.num_regions, found.left_out) == (
        ("new", "cat", "cup"),
        2,
        {"images without a usable region": 1},
    )
    assert found.notes[0].startswith("1 categories marked novel are trained on like all others")
    assert load_training_set("d", path, exclude="novel").num_regions == 1


def test_classes_may_be_excluded_by_a_list_of_names(tmp_path: Path) -> None:
    path = write(tmp_path, [(0, 3, [1, 2, 10, 10], {}), (1, 5, [5, 6, 7, 8], {})])
    names = tmp_path / "held_out.txt"
    names.write_text("\ufeffcat \r\n\ncup\nzebra\n", encoding="utf-8")
    found = load_training_set("d", path, exclude=str(names))
    assert found.class_names == ("new",) and found.file_names == ("0.png",)
    assert found.left_out["regions of excluded classes"] == 1
    assert any("lists 1 names that are no class here: zebra" in note for note in found.notes)
    names.write_text("zebra")
    with pytest.raises(
        InputError,
        match=r"none of the names in .*held_out.txt \(exclude\) is a class of .*train.json",
    ):
        load_training_set("d", path, exclude=str(names))
    with pytest.raises(
        InputError,
        match=r"cannot read the list of excluded classes novell: No such file.*none, novel",
    ):
        load_training_set("d", path, exclude="novell")
    names.write_text("cat\ncup\nnew")
    with pytest.raises(InputError, match=r"has no class to learn: all 3 categories are excluded"):
        load_training_set("d", path, exclude=str(names))
    path.write_text(path.read_text().replace('"novel": true', '"novel": false'))
    with pytest.raises(
        InputError, match=r'marks no category "novel": true, so exclude: novel would leave out none'
    ):
        load_training_set("d", path, exclude="novel")


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        (
            [(0, 3, [1, 2, 10, 10], {})],
            r"of its 1 annotations, left out 1 regions of excluded classes \(exclude: novel",
        ),
        (
            [(0, 5, [1, 2, 9, 9], {"iscrowd": 1})] * 2,
            r"of its 2 annotations, left out 2 crowd regions \(iscrowd\)$",
        ),
        (
            [(0, 5, [50, 2, 9, 9], {})],
            r"of its 1 annotations, left out 1 boxes without area in the image$",
        ),
        ([], "it has no annotations$"),
    ],
)
def test_nothing_to_learn_from_is_an_error_with_the_reason(
    tmp_path: Path, boxes: list[tuple[int, int, list[float], dict[str, Any]]], reason: str
) -> None:
    with pytest.raises(InputError, match=rf"train.json has no region to learn from: {reason}"):
        load_training_set("d", write(tmp_path, boxes), exclude="novel")


def test_digests_follow_the_content(tmp_path: Path) -> None:
    def load(box: list[float], name: str = "cat", category: int = 5) -> TrainingSet:
        path = write(tmp_path, [(0, category, box, {})])
        path.write_text(path.read_text().replace('"cat"', f'"{name}"'))
        return load_training_set("d", path)

    first = load([1, 2, 3, 4])
    assert first.digest == load([1, 2, 3, 4]).digest
    assert first.images_digest() != load([1, 2, 3, 5]).images_digest()
    for other in (load([1, 2, 3, 4], "dog"), load([1, 2, 3, 4], category=7)):
        assert first.images_digest() == other.images_digest() and first.digest != other.digest


def test_categories_that_share_a_name_are_one_class(tmp_path: Path) -> None:
    """As 55 names of V3Det, whose ids are the identity: a region of either is a positive of the one
    word.
    """
    path = write(
        tmp_path, [(0, 5, [1, 2, 3, 4], {}), (1, 7, [1, 2, 3, 4], {}), (2, 3, [1, 2, 3, 4], {})]
    )
    path.write_text(path.read_text().replace('"cup"', '"cat"'))
    found = load_training_set("d", path)
    assert found.class_names == ("new", "cat") and found.class_ids.tolist() == [1, 1, 0]
    assert "1 names stand for several categories each, and are one class each: 'cat'" in found.notes


def test_an_excluded_category_does_not_take_its_name_from_another(tmp_path: Path) -> None:
    path = write(tmp_path, [(0, 5, [1, 2, 3, 4], {}), (1, 3, [1, 2, 3, 4], {})])
    path.write_text(path.read_text().replace('"new"', '"cat"'))
    found = load_training_set("d", path, exclude="novel")
    assert found.class_names == ("cat", "cup") and found.num_regions == 1
    assert not any("several categories" in note for note in found.notes)


def test_suffixes_are_cut_off_on_request_only(tmp_path: Path) -> None:
    path = write(tmp_path, [(0, 5, [1, 2, 3, 4], {}), (1, 7, [1, 2, 3, 4], {})])
    path.write_text(
        path.read_text().replace('"cup"', '"wall-other"').replace('"cat"', '"wall-stuff"')
    )
    assert load_training_set("d", path).class_names == ("new", "wall-stuff", "wall-other")
    cleaned = load_training_set("d", path, clean_names="coco")
    assert cleaned.class_names == ("new", "wall") and cleaned.class_ids.tolist() == [1, 1]


def test_pictures_that_are_not_there_are_kept_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, [(index, 5, [1, 2, 3, 4], {}) for index in range(3)])
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match=r"1 of 3 images are not under .*: 1.png"):
        load_training_set("d", path)
    kept = load_training_set("d", path, missing_images="keep")
    assert kept.file_names == ("0.png", "1.png", "2.png") and kept.file_bytes[1] == MISSING
    path.write_text(path.read_text().replace('"2.png"', '"0.png"'))
    with pytest.raises(InputError, match="both the file"):  # which no skipping would mend
        load_training_set("d", path, missing_images="keep")


def test_a_picture_costs_one_look_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size; whether it is there is seen from the listing of its folder. On a network each look
    takes a while.
    """
    path = write(tmp_path, [])
    content = json.loads(path.read_text())
    content["images"] = [
        {"id": i, "file_name": f"p/{i}.jpg", "width": 9, "height": 9} for i in range(200)
    ]
    content["annotations"] = [
        {"id": i, "image_id": i, "category_id": 5, "bbox": [1, 2, 3, 4]} for i in range(200)
    ]
    path.write_text(json.dumps(content))
    (tmp_path / "p").mkdir()
    for index in range(200):
        (tmp_path / "p" / f"{index}.jpg").write_bytes(b"x" * index)
    looks: list[str] = []
    real = os.stat

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        looks.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    found = load_training_set("d", path)
    assert found.file_bytes.tolist() == list(range(200))
    assert 200 <= sum(look.endswith(".jpg") for look in looks) < 250


def test_every_image_comes_once_in_each_epoch_and_the_order_changes() -> None:
    schedule = BatchSchedule([10], [1], batch_size=4, seed=0)
    images = np.concatenate([schedule.batch(step)[1] for step in range(10)])  # four epochs
    epochs = images.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_data_sets_take_turns_by_their_ratios() -> None:
    schedule = BatchSchedule([5, 7, 1], [1, 2, 1], batch_size=3, seed=0)
    turns = np.array([schedule.batch(step)[0] for step in range(400)]).reshape(100, 4)
    assert all(Counter(turn.tolist()) == {0: 1, 1: 2, 2: 1} for turn in turns)
    assert len({tuple(turn) for turn in turns.tolist()}) == 12
    seen = np.concatenate(
        [images for dataset, images in map(schedule.batch, range(28)) if dataset == 1]
    )
    # its own epochs, whatever comes between
    assert (np.sort(seen.reshape(-1, 7), axis=1) == np.arange(7)).all()


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    sizes, ratios = [50, 20], [1, 1]
    forwards = BatchSchedule(sizes, ratios, 8, seed=3)
    one_by_one = [forwards.batch(step) for step in range(40)]
    for step in (39, 7, 20, 0):
        dataset, images = BatchSchedule(sizes, ratios, 8, seed=3).batch(step)
        assert dataset == one_by_one[step][0] and (images == one_by_one[step][1]).all()
    other = [BatchSchedule(sizes, ratios, 8, seed=4).batch(step)[1].tolist() for step in range(4)]
    assert other != [images.tolist() for _, images in one_by_one[:4]]
    assert len({step_seed(s, step) for s in range(10) for step in range(100)}) == 1000


def test_padding_to_the_most_regions_of_the_batch() -> None:
    tokens = torch.arange(12.0, dtype=torch.float16).reshape(6, 1, 2)
    padded, classes, valid = pad_regions(tokens, np.array([5, 6, 7, 8, 9, 4]), np.array([2, 1, 3]))
    assert valid.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert classes.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 4]]
    assert (
        padded[:, :, 0].tolist() == [[0, 2, 0], [4, 0, 0], [6, 8, 10]]
        and padded.dtype == torch.float32
    )


def test_of_several_tokens_each_is_a_region() -> None:
    tokens = torch.arange(9.0).reshape(3, 3, 1)
    padded, classes, valid = pad_regions(tokens, np.array([5, 6, 7]), np.array([1, 2]))
    assert padded[0, :, 0].tolist() == [0, 1, 2, 0, 0, 0] and padded[1, :, 0].tolist() == [
        3,
        4,
        5,
        6,
        7,
        8,
    ]
    assert classes.tolist() == [[5, 5, 5, 0, 0, 0], [6, 6, 6, 7, 7, 7]]
    assert valid.sum(1).tolist() == [3, 6]


def test_of_a_crowded_image_a_batch_takes_so_many_regions_drawn_anew_each_step() -> None:
    shown = [np.arange(40) % 4 != 0, np.ones(3, bool)]
    limit = RegionLimit(most=5, seed=7)
    first = limit.apply(shown, 0)
    again = RegionLimit(5, 7).apply(shown, 0)
    later = limit.apply(shown, 1)
    assert first[0].sum() == 5 and not (first[0] & ~shown[0]).any()
    assert (first[0] == again[0]).all() and (first[0] != later[0]).any()
    assert (first[1] == shown[1]).all()
    union = np.logical_or.reduce([limit.apply(shown, step)[0] for step in range(60)])
    assert (union == shown[0]).all()  # in time, all of them
    assert RegionLimit().apply(shown, 0) == shown


def test_no_augmentation_when_no_probability() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    varied, shown = CropFlip(0, 0, (400,), (384, 600))(
        image, np.zeros((0, 4), np.float32), np.random.default_rng(0)
    )
    assert varied is image and shown.shape == (0,)


def test_a_flip_mirrors_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    varied, shown = CropFlip(1, 0, (400,), (384, 600))(
        image, np.array([[0, 0, 5, 5]], np.float32), np.random.default_rng()
    )
    assert (varied == image[:, ::-1]).all() and shown.tolist() == [True]


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (30, 40), (1200, 300), (1, 1)])
def test_a_crop_is_384_to_600_pixels_of_an_image_with_shortest_side_400_to_600(
    size: tuple[int, int],
) -> None:
    height, width = size
    image = np.zeros((height, width, 3), np.uint8)
    for seed in range(50):
        crop, _ = CropFlip(0, 1, (400, 500, 600), (384, 600))(
            image, np.zeros((0, 4), np.float32), np.random.default_rng(seed)
        )
        for extent, whole in zip(crop.shape[:2], size, strict=True):
            largest = min(600 / 400 * min(size), whole)  # in original pixels
            assert min(384 / 600 * min(size), whole) - 1 <= extent <= largest + 1


@pytest.mark.parametrize("flip", [0, 1])
def test_regions_that_are_cropped_away_are_left_out(flip: int) -> None:
    """Each box is a bright patch: it is shown if and only if the varied image has a pixel of it."""
    boxes = np.array(
        [[0, 0, 6, 6], [194, 94, 200, 100], [97, 47, 103, 53], [150, 10, 170, 30]], np.float32
    )
    left_out = 0
    for seed in range(60):
        image = np.zeros((100, 200, 3), np.uint8)
        for index, (x0, y0, x1, y1) in enumerate(boxes.astype(int)):
            image[y0:y1, x0:x1] = index + 1
        varied, shown = CropFlip(flip, 1, (400, 500, 600), (384, 600))(
            image, boxes, np.random.default_rng(seed)
        )
        assert shown.tolist() == [bool((varied == index + 1).any()) for index in range(len(boxes))]
        left_out += int((~shown).sum())
    assert left_out > 20


def test_the_authors_keep_regions_that_are_cropped_away() -> None:
    """Every region stays, and the crop is drawn once: it may show none of them."""
    keep = CropFlip(0.5, 1, (400, 500, 600), (384, 600), keep_cropped_regions=True)
    image = np.zeros((100, 800, 3))
    image[:, :2] = 1
    boxes = np.array([[0, 0, 2, 100]], np.float32)
    varied = [
        keep(image.astype(np.uint8), boxes, np.random.default_rng(seed)) for seed in range(40)
    ]
    assert all(shown.tolist() == [True] for _, shown in varied)
    assert any(not crop.any() for crop, _ in varied)


def test_an_image_keeps_at_least_one_region() -> None:
    image, boxes = np.zeros((100, 800, 3), np.uint8), np.array([[0, 0, 2, 2]], np.float32)
    for seed in range(40):
        assert RECIPE(image, boxes, np.random.default_rng(seed))[1].tolist() == [True]


def test_one_resize_is_close_to_the_authors_three() -> None:
    """Cropping in original pixels and resizing once, against resizing, cropping and resizing twice
    more.
    """
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = resize_image(noise, 480, 640)  # smooth, as photographs are
    once = resize_image(image[60:420, 120:560], 224, 224)
    scaled = resize_image(image, 600, 800)[75:525, 150:700]
    thrice = resize_image(resize_image(scaled, 640, 782), 224, 224)
    assert np.abs(once.astype(int) - thrice.astype(int)).mean() < 1
