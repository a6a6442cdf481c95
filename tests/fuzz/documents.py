"""Small annotation files and detection results that are right, to be made strange."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from regionspot.masks import encode_rle

WORDS = ("cat", "dog", "coffee cup", "traffic light", "Vogel", "鳥")
FREQUENCIES = ("r", "c", "f")
ID_STYLES: tuple[Callable[[int], int | str], ...] = (
    *[lambda number: number + 1] * 4,
    lambda number: 3 * number,
    lambda number: -number,
    lambda number: 2**53 + number,
    lambda number: 2**63 - 2 + number,
    lambda number: 2**70 + number,
    lambda number: f"{number:016x}",
    lambda number: str(number),
    lambda number: f"0{number}" if number % 2 else str(number),
    lambda number: f"{number}.png",
    lambda number: f"6ba7b81{number}-9dad-11d1-80b4-00c04fd430c8",
)
"""How tools number their records, from 0 on."""


def annotation_file(rng: random.Random) -> dict[str, Any]:
    """A COCO or LVIS file of one to three images, with every key that is read. Pictures are named
    0.png, 1.png, ...
    """
    lvis, with_masks = rng.random() < 0.3, rng.random() < 0.6
    id_of_image, id_of_category, id_of_annotation = (rng.choice(ID_STYLES) for _ in range(3))
    names = enumerate(WORDS[: rng.choice((1, 2, 4, 6))])
    categories = [_category(id_of_category(number), name, lvis, rng) for number, name in names]
    images = [
        _image(index, id_of_image(index), categories, lvis, rng)
        for index in range(rng.choice((1, 2, 3)))
    ]
    count = rng.choice((1, 4, 8))
    annotations = [
        _annotation(id_of_annotation(n), rng.choice(images), categories, with_masks, rng)
        for n in range(count)
    ]
    return {
        "info": {"year": 2026},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def results(images: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Detections of some of the images, as COCO has them."""
    return [
        {
            "image_id": image["id"],
            "category_id": 1,
            "bbox": _bbox(image, rng),
            "score": rng.random(),
        }
        for image in rng.choices(images, k=rng.choice((0, 1, 3, 12)))
    ]


def results_by_image(images: list[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """The same as RegionSpot's authors publish them: columns, with boxes xyxy, by image id."""
    grouped: dict[str, Any] = {}
    for result in results(images, rng):
        x, y, width, height = result["bbox"]
        of_image = grouped.setdefault(
            str(result["image_id"]), {"boxes": [], "scores": [], "labels": []}
        )
        of_image["boxes"].append([x, y, x + width, y + height])
        of_image["scores"].append(result["score"])
        of_image["labels"].append(1)
    return grouped


def _category(id_: int | str, name: str, lvis: bool, rng: random.Random) -> dict[str, Any]:
    category: dict[str, Any] = {"id": id_, "name": name, "supercategory": "thing"}
    if lvis:
        category["frequency"] = rng.choice(FREQUENCIES)
    if rng.random() < 0.1:
        category["novel"] = True
    return category


def _image(
    index: int, id_: int | str, categories: list[dict[str, Any]], lvis: bool, rng: random.Random
) -> dict[str, Any]:
    image: dict[str, Any] = {
        "id": id_,
        "file_name": f"{index}.png",
        "width": 64 + index,
        "height": 48,
    }
    if lvis:
        image["neg_category_ids"] = [
            category["id"] for category in categories if rng.random() < 0.3
        ]
        image["not_exhaustive_category_ids"] = [
            category["id"] for category in categories if rng.random() < 0.3
        ]
        if rng.random() < 0.5:
            image["coco_url"] = f"http://images.example/val2017/{image['file_name']}"
    return image


def _annotation(
    id_: int | str,
    image: dict[str, Any],
    categories: list[Any],
    with_mask: bool,
    rng: random.Random,
) -> dict[str, Any]:
    x, y, width, height = box = _bbox(image, rng)
    annotation: dict[str, Any] = {
        "id": id_,
        "image_id": image["id"],
        "category_id": rng.choice(categories)["id"],
        "bbox": box,
        "area": width * height,
        "iscrowd": int(rng.random() < 0.1),
    }
    segmentation = rng.choice(
        ("polygon", "runs", "compressed") if with_mask else ("none", "none", "polygon")
    )
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
