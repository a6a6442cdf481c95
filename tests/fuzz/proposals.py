"""Detection results through `load_proposals` and `Detections.from_coco`, beside a plain reading of
the same JSON.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import RegionSpotError
from regionspot.evaluation.detections import Detections
from regionspot.evaluation.proposals import Proposals, load_proposals
from tests.fuzz.documents import ID_STYLES, results, results_by_image
from tests.fuzz.reference import check_float, check_id, exact_number, id_meaning
from tests.fuzz.target import attempt, check, fail, write
from tests.fuzz.trees import Note, Tree, encode, mutate_values, respell

ROUNDING = 0.01
Image = dict[str, Any]
Id = int | str
FILE_NAMES = ("{}.jpg", "train/{}.jpg", "{:012}.jpg", "{}.jpg")


class ProposalFiles:
    """The target: one data set for each way to number images."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._datasets = []
        for style, id_of in enumerate(ID_STYLES):
            name = FILE_NAMES[style % len(FILE_NAMES)]
            images = [
                {
                    "id": id_of(number),
                    "file_name": name.format(number + style % 2),
                    "width": 60 + number,
                    "height": 50,
                }
                for number in range(4)
            ]
            content = {
                "images": images,
                "annotations": [],
                "categories": [{"id": 1, "name": "cat"}],
            }
            path = write(directory, f"annotations{style}.json", json.dumps(content).encode())
            self._datasets.append((images, CocoDataset.load(path, check_images=False)))

    def run(self, rng: random.Random, note: Note) -> bool:
        images, dataset = rng.choice(self._datasets)
        named = [
            image | {"id": name} for image, name in zip(images, _spelled(images, rng), strict=True)
        ]
        tree: Tree = results(named, rng) if rng.random() < 0.7 else results_by_image(named, rng)
        how = rng.choice(("whole", "respelt", *["values"] * 6, "text", "both"))
        note(f"images {named}; {how}")
        if how == "respelt":
            tree = respell(tree, rng)
        elif how in ("values", "both"):
            tree = mutate_values(tree, rng, note, rng.choice((1, 1, 1, 2, 4)))
        path = write(
            self._directory,
            "proposals.json",
            content := encode(tree, rng, note, how in ("text", "both")),
        )
        if isinstance(tree, list) and rng.random() < 0.2:
            return _as_detections(tree)
        proposals = attempt(lambda: load_proposals(path, dataset))
        if isinstance(proposals, RegionSpotError):
            return False
        check_proposals(proposals, images, json.loads(content))
        return True


def _as_detections(tree: list[Any]) -> bool:
    """The same list as detections to be judged."""
    detections = attempt(lambda: Detections.from_coco(tree))
    if isinstance(detections, RegionSpotError):
        return False
    check(len(detections) == len(tree), f"{len(detections)} detections of {len(tree)}")
    for index, result in enumerate(tree):
        check_id(detections.image_ids.tolist()[index], result["image_id"], "image_id")
        check_id(detections.category_ids.tolist()[index], result["category_id"], "category_id")
        check_float(float(detections.scores[index]), result["score"], "score")
        x, y, width, height = (float(exact_number(value)) for value in result["bbox"])
        box = [x, y, x + width, y + height]
        check(
            all(map(math.isfinite, box)) and detections.boxes[index].tolist() == box,
            f"{box}: {detections.boxes[index]}",
        )
    return True


def check_proposals(proposals: Proposals, images: list[Image], read: Tree) -> None:
    """Every image has the boxes that the JSON gives it, in its order, but those that lie outside
    the image.
    """
    rows = list(_rows(read))
    boxes, scores, outside = _expected(rows, images, _meaning([row[0] for row in rows], images))
    check(
        set(proposals.boxes) == {image["id"] for image in images}, f"images {list(proposals.boxes)}"
    )
    check(
        proposals.num_dropped == outside,
        f"{proposals.num_dropped} boxes were dropped, {outside} lie outside",
    )
    check(proposals.scores is not None, "no scores")
    for id_, found in proposals.boxes.items():
        wanted = np.array(boxes[id_], np.float64).reshape(-1, 4)
        check(found.dtype == np.float64 and bool(np.isfinite(found).all()), f"boxes {found}")
        check(
            np.array_equal(found, wanted), f"image {id_} has the boxes {found} instead of {wanted}"
        )
        for score, value in zip((proposals.scores or {})[id_].tolist(), scores[id_], strict=True):
            check_float(score, value, "score")


def _spelled(images: list[Image], rng: random.Random) -> list[Any]:
    """How a detector may name the images: by id, as number or text, or by file name."""
    ways: tuple[Callable[[Image], Any], ...] = (
        *[lambda image: image["id"]] * 4,
        lambda image: str(image["id"]),
        lambda image: image["file_name"],
        lambda image: PurePosixPath(image["file_name"]).name,
        lambda image: PurePosixPath(image["file_name"]).stem,
        lambda image: str(image["id"]).zfill(12),
    )
    way = rng.choice(ways)
    return [way(image) for image in images]


def _rows(read: Tree) -> Iterator[tuple[Any, list[float], Any]]:
    """Image name, box xyxy and raw score of each result."""
    if isinstance(read, list):
        for result in read:
            x, y, width, height = (float(exact_number(value)) for value in result["bbox"])
            yield result["image_id"], [x, y, x + width, y + height], result["score"]
        return
    for name, columns in read.items():
        for box, score in zip(columns["boxes"], columns["scores"], strict=True):
            yield name, [float(exact_number(value)) for value in box], score


def _meaning(names: list[Any], images: list[Image]) -> dict[Id, Id]:
    """The image that each name means: ids before zero-padded ids, file names and names without
    ending.
    """
    names = [name if isinstance(name, str) else id_meaning(name) for name in names]
    by_id = {id_meaning(image["id"]): image["id"] for image in images}
    readings: tuple[dict[Any, Any], ...] = (
        by_id,
        {
            name: by_id.get(int(name))
            for name in names
            if isinstance(name, str) and name.isdecimal()
        },
        {name: image["id"] for image in images for name in _names(image)},
        {
            PurePosixPath(name).with_suffix("").as_posix(): image["id"]
            for image in images
            for name in _names(image)
        },
    )
    for reading in readings:
        found: dict[Any, Any] = {
            name: reading.get(name, reading.get(id_meaning(name))) for name in names
        }
        if None not in found.values():
            return found
    fail(f"the names {names!r:.200} were taken for images")


def _names(image: Image) -> tuple[str, str]:
    return image["file_name"], PurePosixPath(image["file_name"]).name


def _expected(
    rows: list[tuple[Any, list[float], Any]], images: list[Image], meaning: dict[Id, Id]
) -> tuple[dict[Id, list[Any]], dict[Id, list[Any]], int]:
    """Boxes xyxy and raw scores by image id, and how many boxes lie outside their image."""
    boxes, scores, outside = defaultdict(list), defaultdict(list), 0
    limits = {
        image["id"]: np.array([image["width"], image["height"]] * 2, np.float32) for image in images
    }
    for name, (x0, y0, x1, y1), score in rows:
        check(x1 - x0 >= -ROUNDING and y1 - y0 >= -ROUNDING, f"a box {x0}, {y0}, {x1}, {y1}")
        id_ = meaning[name if isinstance(name, str) else id_meaning(name)]
        whole = [x0, y0, max(x0, x1), max(y0, y1)]
        clipped = np.clip(np.array(whole, np.float32), 0, limits[id_])
        if clipped[0] < clipped[2] and clipped[1] < clipped[3]:
            boxes[id_].append(whole)
            scores[id_].append(score)
        else:
            outside += 1
    return boxes, scores, outside
