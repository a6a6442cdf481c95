"""Random annotations with detections of them, for comparison with the reference evaluators."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_api

from regionspot.data.coco_json import CocoDataset

HEIGHT, WIDTH = 160, 200
CATEGORY_IDS = (2, 3, 4, 8, 9, 11, 14)
WITHOUT_GROUND_TRUTH = 14


@dataclass(frozen=True)
class RandomData:
    """A file on disk, the same in memory, and detections of it."""

    path: Path
    dataset: CocoDataset
    detections: list[dict[str, Any]]


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., RandomData]:
    def make(seed: int, num_images: int = 25, detections_per_object: int = 3) -> RandomData:
        content, detections = _random_content(
            np.random.default_rng(seed), num_images, detections_per_object
        )
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps(content))
        return RandomData(path, CocoDataset.load(path, check_images=False), detections)

    return make


def _random_content(
    rng: np.random.Generator, num_images: int, detections_per_object: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Misses, false and duplicate hits, wrong classes, crowds, tied scores, empty images, all three
    sizes.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    shown_ids = [i for i in CATEGORY_IDS if i != WITHOUT_GROUND_TRUTH]
    for image_id in range(1, num_images + 1):
        shown: set[int] = set()
        for _ in range(rng.integers(0, 7)):
            box = _random_box(rng)
            category_id = int(rng.choice(shown_ids))
            shown.add(category_id)
            mask = _mask(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box.tolist(),
                    "area": float(mask.sum()),
                    "iscrowd": int(rng.random() < 0.15),
                    "segmentation": _rle(mask),
                }
            )
            if rng.random() < 0.8:
                for _ in range(detections_per_object):
                    near = np.maximum(box + rng.normal(0, 0.06, 4) * box[[2, 3, 2, 3]], 1)
                    label = category_id if rng.random() < 0.7 else int(rng.choice(CATEGORY_IDS))
                    detections.append(_detection(rng, image_id, label, near))
        detections += [
            _detection(rng, image_id, int(rng.choice(CATEGORY_IDS)), _random_box(rng))
            for _ in range(rng.integers(0, 3))
        ]
        absent = [i for i in CATEGORY_IDS if i not in shown]
        images.append(
            {
                "id": image_id,
                "file_name": f"{image_id}.jpg",
                "height": HEIGHT,
                "width": WIDTH,
                "neg_category_ids": [i for i in absent if rng.random() < 0.5],
                "not_exhaustive_category_ids": [i for i in shown if rng.random() < 0.2],
            }
        )
    categories = [
        {
            "id": i,
            "name": f"thing {i}",
            "frequency": "rcf"[i % 3],
            "novel": i in (4, 9, WITHOUT_GROUND_TRUTH),
        }
        for i in CATEGORY_IDS
    ]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def _random_box(rng: np.random.Generator) -> np.ndarray:
    """xywh; sides of 4 to 160 pixels, so that all of COCO's size classes occur."""
    size = np.exp(rng.uniform(np.log(5), np.log(150))) * rng.uniform(0.8, 1.25, 2)
    size = np.minimum(size, [WIDTH, HEIGHT])
    return np.concatenate([rng.uniform(0, [WIDTH - size[0], HEIGHT - size[1]]), size])


def _detection(
    rng: np.random.Generator, image_id: int, category_id: int, box: np.ndarray
) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box.tolist(),
        "score": round(float(rng.random()), 1),
        "segmentation": _rle(_mask(box)),
    }


def _mask(box: np.ndarray) -> np.ndarray:
    """An ellipse in the box, at least one pixel."""
    x, y, width, height = box
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    mask = ((columns - x - width / 2) / width) ** 2 + (
        (rows - y - height / 2) / height
    ) ** 2 <= 0.25
    mask[min(int(y + height / 2), HEIGHT - 1), min(int(x + width / 2), WIDTH - 1)] = True
    return mask


def _rle(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}
