"""Small annotation files and detection results that are right, to be made strange."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from regionspot.masks import encode_rle
from tests.fuzz.trees import Tree

WORDS = ("cat", "dog", "coffee cup", "traffic light", "Vogel", "鳥")
FREQUENCIES = ("r", "c", "f")


def annotation_file(rng: random.Random) -> dict[str, Any]:
    """A COCO or LVIS file of one to three images, with every key that is read. Pictures are named 0.png, 1.png, ..."""
    lvis = rng.random() < 0.3
    categories = [_category(id_, name, lvis, rng) for id_, name in enumerate(WORDS[: rng.choice((1, 2, 4, 6))], 1)]
    images = [_image(index, categories, lvis, rng) for index in range(rng.choice((1, 2, 3)))]
    annotations = [_annotation(id_, rng.choice(images), categories, rng) for id_ in range(1, rng.choice((2, 5, 9)))]
    return {"info": {"year": 2026}, "images": images, "annotations": annotations, "categories": categories}


def results(images: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Detections of some of the images."""
    return [
        {
            "image_id": (image := rng.choice(images))["id"],
            "category_id": 1,
            "bbox": _bbox(image, rng),
            "score": rng.random(),
        }
        for _ in range(rng.choice((0, 1, 3, 12)))
    ]


def results_by_image(images: list[dict[str, Any]], rng: random.Random) -> Tree:
    """The same as RegionSpot's authors keep them: a dictionary by image id."""
    grouped: dict[str, list[Any]] = {str(image["id"]): [] for image in images}
    for result in results(images, rng):
        grouped[str(result["image_id"])].append(result)
    return grouped


def _category(id_: int, name: str, lvis: bool, rng: random.Random) -> dict[str, Any]:
    category: dict[str, Any] = {"id": id_, "name": name, "supercategory": "thing"}
    if lvis:
        category["frequency"] = rng.choice(FREQUENCIES)
    if id_ > 1 and rng.random() < 0.1:
        category["novel"] = True
    return category


def _image(index: int, categories: list[dict[str, Any]], lvis: bool, rng: random.Random) -> dict[str, Any]:
    id_ = rng.choice((index + 1, 1000 + index, 2**40 + index))
    image: dict[str, Any] = {"id": id_, "file_name": f"{index}.png", "width": 64 + index, "height": 48}
    if lvis:
        image["neg_category_ids"] = [category["id"] for category in categories if rng.random() < 0.3]
        image["not_exhaustive_category_ids"] = [category["id"] for category in categories if rng.random() < 0.3]
        if rng.random() < 0.5:
            image["coco_url"] = f"http://images.example/val2017/{image['file_name']}"
    return image


def _annotation(id_: int, image: dict[str, Any], categories: list[Any], rng: random.Random) -> dict[str, Any]:
    x, y, width, height = box = _bbox(image, rng)
    annotation: dict[str, Any] = {
        "id": id_,
        "image_id": image["id"],
        "category_id": rng.choice(categories)["id"],
        "bbox": box,
        "area": width * height,
        "iscrowd": int(rng.random() < 0.1),
    }
    segmentation = rng.choice(("none", "polygon", "runs", "compressed"))
    if segmentation == "polygon":
        annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    elif segmentation != "none":
        mask = np.zeros((image["height"], image["width"]), bool)
        mask[int(y) : int(y + height) + 1, int(x) : int(x + width) + 1] = True
        size = [image["height"], image["width"]]
        counts: Any = encode_rle(mask)["counts"] if segmentation == "compressed" else _runs(mask)
        annotation["segmentation"] = {"size": size, "counts": counts}
    return annotation


def _bbox(image: dict[str, Any], rng: random.Random) -> list[float]:
    x, y = rng.uniform(0, image["width"] - 6), rng.uniform(0, image["height"] - 6)
    box = [x, y, rng.uniform(1, image["width"] - x), rng.uniform(1, image["height"] - y)]
    return [float(int(value)) for value in box] if rng.random() < 0.3 else box


def _runs(mask: Any) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, background first."""
    flat = mask.flatten(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    return np.diff([0, *changes, flat.size]).tolist()
