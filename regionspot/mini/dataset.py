"""Write the mini world as LVIS-format JSON and JPEGs, so that no other code knows it is synthetic.

The training split has base categories alone, all alike or in a long tail; the validation split has
every category alike, and so has the split of crowds, larger pictures with up to 100 small toys
each. Each category's `frequency` is LVIS's: rare in up to 10 training images, common in up to 100,
frequent beyond. Pictures are annotated completely: every other category is a negative.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from regionspot.errors import InputError
from regionspot.files import write_atomically
from regionspot.masks import encode_rle, mask_to_box
from regionspot.mini.render import render_scene
from regionspot.mini.world import (
    BASE_WEIGHTS,
    CATEGORIES,
    TAIL_WEIGHTS,
    UNIFORM_WEIGHTS,
    WORLD_VERSION,
    Scene,
    sample_crowd,
    sample_scene,
)
from regionspot.progress import Progress

SPLITS = {"train": 1, "val": 2, "crowds": 3}  # split -> its part of a scene's seed
CHUNK = 50
JPEG_QUALITY = 95

_Objects = list[dict[str, Any]]


def build_dataset(
    directory: Path,
    num_train: int,
    num_val: int,
    seed: int = 0,
    workers: int = 2,
    *,
    num_crowds: int = 0,
    long_tail: bool = False,
) -> tuple[Path, ...]:
    """Make `train.json`, `val.json` and the pictures under `train/` and `val/`; the same for the
    same arguments.

    What is already there from the same arguments is kept, anything else of the same name replaced.

    Args:
        num_crowds: pictures of crowds; with none, there is no `crowds.json`.
        long_tail: a third each of the base categories is frequent, common and rare in training, at
            1 : 0.22 : 0.022, instead of all alike.

    Returns:
        The paths of the annotation files: of training, of validation, and of crowds if there are
        any.

    Raises:
        InputError: a split of no images.
    """
    if num_train < 1 or num_val < 1 or num_crowds < 0:
        raise InputError(
            f"a split needs one image or more, not {num_train} for training and {num_val} for "
            f"validation, and there cannot be {num_crowds} pictures of crowds"
        )
    counts = {"train": num_train, "val": num_val} | ({"crowds": num_crowds} if num_crowds else {})
    paths = tuple(directory / f"{split}.json" for split in counts)
    recipe: dict[str, Any] = {
        "description": "regionspot mini world",
        "version": WORLD_VERSION,
        "seed": seed,
    }
    recipe |= {f"num_{split}": count for split, count in counts.items()} | {"long_tail": long_tail}
    if all(_recipe_of(path) == recipe for path in paths):
        return paths
    for path in paths:
        # no annotation file may stand beside pictures of another recipe
        path.unlink(missing_ok=True)
    scenes = {
        s: _render_split(directory, s, count, seed, long_tail, workers)
        for s, count in counts.items()
    }
    image_counts = Counter(
        index for _, objects in scenes["train"] for index in {o["category"] for o in objects}
    )
    categories = [_category_entry(index, image_counts[index]) for index in range(len(CATEGORIES))]
    for path, split in zip(paths, counts, strict=True):
        listed = [c for c in categories if split != "train" or not c.get("novel")]
        content = {
            "info": recipe,
            "categories": listed,
            **_split_entries(split, scenes[split], [c["id"] for c in listed]),
        }
        write_atomically(path, json.dumps(content).encode())
    return paths


def _recipe_of(path: Path) -> dict[str, Any] | None:
    try:
        info: dict[str, Any] = json.loads(path.read_bytes())["info"]
    except (OSError, ValueError, KeyError):
        return None
    return info


def _render_split(
    directory: Path, split: str, count: int, seed: int, long_tail: bool, workers: int
) -> list[tuple[tuple[int, int], _Objects]]:
    """For each picture its (width, height) and objects, in order; the pictures are written on the
    way.
    """
    (directory / split).mkdir(parents=True, exist_ok=True)
    write = partial(_write_picture, directory, split, seed, long_tail)
    # a fork would copy whatever threads the caller has running
    context = multiprocessing.get_context("spawn")
    scenes = []
    with (
        ProcessPoolExecutor(workers, context) as pool,
        Progress(f"rendering {split}", count, "images") as progress,
    ):
        for scene in pool.map(write, range(count), chunksize=CHUNK):
            scenes.append(scene)
            progress.update(len(scenes))
    return scenes


def _write_picture(
    directory: Path, split: str, seed: int, long_tail: bool, index: int
) -> tuple[tuple[int, int], _Objects]:
    picture, toys = render_scene(
        _scene(np.random.default_rng([seed, SPLITS[split], index]), split, long_tail)
    )
    path = directory / _file_name(split, index)
    Image.fromarray(picture).save(path, quality=JPEG_QUALITY, subsampling=0)
    return picture.shape[1::-1], [_describe(category, mask) for category, mask in toys]


def _scene(rng: np.random.Generator, split: str, long_tail: bool) -> Scene:
    if split == "crowds":
        return sample_crowd(rng, UNIFORM_WEIGHTS)
    if split == "val":
        return sample_scene(rng, UNIFORM_WEIGHTS)
    return sample_scene(rng, TAIL_WEIGHTS if long_tail else BASE_WEIGHTS)


def _describe(category: int, mask: np.ndarray) -> dict[str, Any]:
    x0, y0, x1, y1 = mask_to_box(mask).tolist()
    return {
        "category": category,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(mask.sum()),
        "segmentation": encode_rle(mask),
    }


def _file_name(split: str, index: int) -> str:
    return f"{split}/{index:06}.jpg"


def _category_entry(index: int, image_count: int) -> dict[str, Any]:
    category = CATEGORIES[index]
    entry: dict[str, Any] = {"id": category.id, "name": category.name}
    if category.novel:
        return entry | {"novel": True}
    frequency = "r" if image_count <= 10 else "c" if image_count <= 100 else "f"
    return entry | {"frequency": frequency, "image_count": image_count}


def _split_entries(
    split: str, scenes: list[tuple[tuple[int, int], _Objects]], category_ids: list[int]
) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, ((width, height), objects) in enumerate(scenes):
        shown = {CATEGORIES[o["category"]].id for o in objects}
        image = {
            "id": index + 1,
            "file_name": _file_name(split, index),
            "width": width,
            "height": height,
        }
        negatives = [i for i in category_ids if i not in shown]
        images.append(image | {"neg_category_ids": negatives, "not_exhaustive_category_ids": []})
        for found in objects:
            entry = {key: found[key] for key in ("bbox", "area", "segmentation")}
            owner = {"id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0}
            annotations.append(owner | {"category_id": CATEGORIES[found["category"]].id} | entry)
    return {"images": images, "annotations": annotations}
