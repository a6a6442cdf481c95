"""The mini world as LVIS-format files that no other code can tell from a real data set."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.masks import decode_rle
from regionspot.mini.dataset import build_dataset
from regionspot.mini.world import CATEGORIES


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mini")
    build_dataset(directory, num_train=60, num_val=30, seed=3)
    return directory


def test_both_splits_are_whole_lvis_files(built: Path) -> None:
    train, val = CocoDataset.load(built / "train.json"), CocoDataset.load(built / "val.json")
    assert (len(train.images), len(val.images)) == (60, 30)
    assert (len(train.categories), len(val.categories)) == (300, 410)
    assert sum(category.novel for category in val.categories) == 110
    assert not any(category.novel for category in train.categories)
    for dataset in (train, val):
        for record in dataset.images:
            assert Image.open(dataset.image_path(record)).size == (record.width, record.height)


def test_boxes_enclose_their_masks(built: Path) -> None:
    val = CocoDataset.load(built / "val.json")
    for group in val.annotations_by_image.values():
        for annotation in group:
            assert isinstance(annotation.segmentation, dict)
            rows, columns = np.nonzero(decode_rle(annotation.segmentation))  # type: ignore[arg-type]
            assert annotation.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert annotation.area == len(rows)


def test_frequency_follows_the_training_images(built: Path) -> None:
    train = CocoDataset.load(built / "train.json")
    counts = Counter(
        category
        for group in train.annotations_by_image.values()
        for category in {a.category_id for a in group}
    )
    expected = {
        category.id: "r" if counts[category.id] <= 10 else "c" for category in train.categories
    }
    assert {category.id: category.frequency for category in train.categories} == expected
    val = CocoDataset.load(built / "val.json")
    assert all(category.frequency == expected.get(category.id) for category in val.categories)


def test_every_category_that_a_picture_does_not_show_is_its_negative(built: Path) -> None:
    val = CocoDataset.load(built / "val.json")
    for record in val.images:
        shown = {annotation.category_id for annotation in val.annotations_by_image[record.id]}
        assert shown.isdisjoint(record.neg_category_ids or ())
        assert len(shown) + len(record.neg_category_ids or ()) == 410


def test_the_same_seed_builds_the_same_files_and_another_seed_others(
    built: Path, tmp_path: Path
) -> None:
    build_dataset(tmp_path / "again", num_train=60, num_val=30, seed=3, workers=1)
    build_dataset(tmp_path / "other", num_train=60, num_val=30, seed=4)
    same, other = tmp_path / "again" / "train.json", tmp_path / "other" / "train.json"
    assert same.read_bytes() == (built / "train.json").read_bytes() != other.read_bytes()
    picture = "train/000007.jpg"
    assert (tmp_path / "again" / picture).read_bytes() == (built / picture).read_bytes()


def test_what_is_there_is_kept_and_another_recipe_replaces_it(tmp_path: Path) -> None:
    build_dataset(tmp_path, num_train=2, num_val=1)
    written = (tmp_path / "train.json").stat().st_mtime_ns
    build_dataset(tmp_path, num_train=2, num_val=1)
    assert (tmp_path / "train.json").stat().st_mtime_ns == written
    build_dataset(tmp_path, num_train=3, num_val=1)
    assert len(json.loads((tmp_path / "train.json").read_text())["images"]) == 3


def test_crowds_are_a_split_of_their_own(built: Path, tmp_path: Path) -> None:
    paths = build_dataset(tmp_path, num_train=60, num_val=30, seed=3, num_crowds=2)
    assert [path.name for path in paths] == ["train.json", "val.json", "crowds.json"]
    crowds = CocoDataset.load(paths[2])
    assert len(crowds.categories) == 410 and all(
        len(group) >= 18 for group in crowds.annotations_by_image.values()
    )
    assert (tmp_path / "val" / "000003.jpg").read_bytes() == (
        built / "val" / "000003.jpg"
    ).read_bytes()


def test_a_long_tail_draws_rare_categories_seldom(tmp_path: Path) -> None:
    train = CocoDataset.load(build_dataset(tmp_path, num_train=150, num_val=1, long_tail=True)[0])
    counts = Counter(a.category_id for group in train.annotations_by_image.values() for a in group)
    by_weight: dict[float, int] = Counter()
    for category in CATEGORIES:
        by_weight[category.tail_weight] += counts[category.id]
    frequent, common, rare = sorted(
        (by_weight[weight] for weight in by_weight if weight), reverse=True
    )
    assert frequent > 3 * common > 9 * rare


def test_a_split_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be -1 pictures of crowds"):
        build_dataset(tmp_path, num_train=1, num_val=1, num_crowds=-1)
    with pytest.raises(InputError, match="one image or more"):
        build_dataset(tmp_path, num_train=0, num_val=1)
