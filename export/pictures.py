"""Pictures with regions and words to try a model on: from a data set, a folder, or the mini
world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regionspot.data.coco_json import CocoDataset
from regionspot.data.formats import load_dataset
from regionspot.errors import InputError
from regionspot.files import list_files
from regionspot.images import read_image
from regionspot.masks import mask_to_box
from regionspot.structures import FloatArray, UInt8Array
from regionspot.vocabulary import parse_vocabulary

NUM_PICTURES = 32
NUM_WORDS = 80

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BOXES_OF_A_FOLDER = 8  # for each picture, since nobody has annotated it
_MINI_SPLIT = 3  # the mini world's training and validation scenes are 1 and 2


@dataclass(frozen=True, eq=False)
class Picture:
    """(H, W, 3) uint8 RGB and regions of it, (n, 4) xyxy pixels, n at least 1."""

    image: UInt8Array
    boxes: FloatArray


@dataclass(frozen=True, eq=False)
class Pictures:
    """`source` says in words where they are from."""

    source: str
    pictures: tuple[Picture, ...]
    words: tuple[str, ...]


def load_pictures(source: str | Path | None, count: int = NUM_PICTURES, seed: int = 0) -> Pictures:
    """Up to `count` pictures, drawn from a data set.

    Args:
        source: an annotation file in COCO or LVIS format, its pictures beside it; or a folder of
            pictures, for which boxes are drawn at random. None stands for scenes of the mini world
            that are in none of its splits.

    Raises:
        InputError: there is nothing there, or it cannot be read.
    """
    rng = np.random.default_rng([seed, _MINI_SPLIT])
    if source is None:
        return _from_mini_world(count, seed)
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"there is no file or folder {path}: name an annotation file, or a folder of pictures"
        )
    return _from_folder(path, count, rng) if path.is_dir() else _from_dataset(path, count, rng)


def _from_dataset(path: Path, count: int, rng: np.random.Generator) -> Pictures:
    dataset = load_dataset(path)
    boxes = {
        record.id: _boxes(dataset, record.id, record.width, record.height)
        for record in dataset.images
    }
    usable = [record for record in dataset.images if len(boxes[record.id])]
    if not usable:
        raise InputError(
            f"{path} has no picture with a box: name a data set with annotations, or a folder of "
            "pictures"
        )
    chosen = [usable[index] for index in rng.permutation(len(usable))[:count]]
    pictures = tuple(
        Picture(read_image(dataset.image_path(record)), boxes[record.id]) for record in chosen
    )
    return Pictures(
        f"{len(pictures)} images of {path.name}", pictures, _some(dataset.class_names, rng)
    )


def _boxes(dataset: CocoDataset, image_id: int | str, width: int, height: int) -> FloatArray:
    boxes = np.array(
        [one.box for one in dataset.annotations_by_image[image_id]], np.float32
    ).reshape(-1, 4)
    boxes = np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)
    kept: FloatArray = boxes[(boxes[:, :2] < boxes[:, 2:]).all(1)]
    return kept


def _from_folder(path: Path, count: int, rng: np.random.Generator) -> Pictures:
    listing = list_files(path, SUFFIXES, recursive=True)
    files, hidden = listing.files, listing.skipped.get("hidden file", 0)
    passed_over = f" ({hidden} hidden files passed over)" if hidden else ""
    if not files:
        raise InputError(
            f"{path} holds no picture ({', '.join(SUFFIXES)}){passed_over}: name another folder, "
            "or an annotation file"
        )
    images = [read_image(files[index]) for index in rng.permutation(len(files))[:count]]
    pictures = tuple(
        Picture(image, _random_boxes(image.shape[0], image.shape[1], rng)) for image in images
    )
    return Pictures(
        f"{len(pictures)} images of {path.name}/{passed_over}",
        pictures,
        _some(parse_vocabulary("coco"), rng),
    )


def _random_boxes(height: int, width: int, rng: np.random.Generator) -> FloatArray:
    """A tenth to six tenths of the picture's sides, anywhere in it."""
    sides = rng.uniform(0.1, 0.6, (BOXES_OF_A_FOLDER, 2))
    start = rng.uniform(0, 1 - sides)
    return (np.concatenate([start, start + sides], axis=1) * [width, height, width, height]).astype(
        np.float32
    )


def _from_mini_world(count: int, seed: int) -> Pictures:
    from regionspot.mini.render import render_scene
    from regionspot.mini.world import CATEGORIES, UNIFORM_WEIGHTS, sample_scene

    pictures = []
    for index in range(count):
        image, toys = render_scene(
            sample_scene(np.random.default_rng([seed, _MINI_SPLIT, index]), UNIFORM_WEIGHTS)
        )
        if toys:
            pictures.append(
                Picture(image, np.stack([mask_to_box(mask) for _, mask in toys]).astype(np.float32))
            )
    names = [category.name for category in CATEGORIES]
    words = _some(names, np.random.default_rng([seed, _MINI_SPLIT]))
    return Pictures(f"{len(pictures)} scenes of the mini world", tuple(pictures), words)


def _some(names: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(names[index] for index in sorted(rng.permutation(len(names))[:NUM_WORDS]))
