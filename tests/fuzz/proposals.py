"""Detection results through `load_proposals`, beside a plain reading of the same JSON."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import RegionSpotError
from regionspot.evaluation.proposals import Proposals, load_proposals
from tests.fuzz.documents import results, results_by_image
from tests.fuzz.reference import check_float, exact_number
from tests.fuzz.target import attempt, check, write
from tests.fuzz.trees import Note, Tree, encode, mutate_values, respell

IMAGES = [{"id": id_, "file_name": f"{id_}.jpg", "width": 60 + id_ % 7, "height": 50} for id_ in (1, 2, 139, 2**53 + 1)]


class ProposalFiles:
    """The target."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        content = {"images": IMAGES, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        path = write(directory, "annotations.json", json.dumps(content).encode())
        self._dataset = CocoDataset.load(path, check_images=False)

    def run(self, rng: random.Random, note: Note) -> bool:
        tree: Tree = results(IMAGES, rng) if rng.random() < 0.7 else results_by_image(IMAGES, rng)
        how = rng.choice(("whole", "respelt", *["values"] * 6, "text", "both"))
        note(how)
        if how == "respelt":
            tree = respell(tree, rng)
        elif how in ("values", "both"):
            tree = mutate_values(tree, rng, note, rng.choice((1, 1, 1, 2, 4)))
        path = write(self._directory, "proposals.json", content := encode(tree, rng, note, how in ("text", "both")))
        proposals = attempt(lambda: load_proposals(path, self._dataset))
        if isinstance(proposals, RegionSpotError):
            return False
        check_proposals(proposals, json.loads(content))
        return True


def check_proposals(proposals: Proposals, read: Tree) -> None:
    """Every image has the boxes that the JSON gives it, in its order, but those that lie outside the image."""
    expected, scores, outside = _expected(read)
    check(set(proposals.boxes) == {image["id"] for image in IMAGES}, f"images {list(proposals.boxes)}")
    check(proposals.num_dropped == outside, f"{proposals.num_dropped} boxes were dropped, {outside} lie outside")
    for image in IMAGES:
        id_ = int(str(image["id"]))
        boxes, wanted = proposals.boxes[id_], np.array(expected[id_]).reshape(-1, 4)
        check(boxes.dtype == np.float64 and bool(np.isfinite(boxes).all()), f"boxes {boxes}")
        check(np.array_equal(boxes, wanted), f"image {id_} has the boxes {boxes} instead of {wanted}")
        if proposals.scores is not None:
            found = proposals.scores[id_]
            check(len(found) == len(scores[id_]), f"{len(found)} scores of {len(scores[id_])}")
            for score, value in zip(found.tolist(), scores[id_], strict=True):
                check_float(score, value, "score")


def _expected(read: Tree) -> tuple[dict[int, list[Any]], dict[int, list[Any]], int]:
    """Boxes xyxy and raw scores by image id, and how many boxes lie outside their image."""
    boxes, scores, outside = defaultdict(list), defaultdict(list), 0
    sizes = {int(str(image["id"])): (image["width"], image["height"]) for image in IMAGES}
    for id_, result in _results(read):
        x, y, width, height = (float(exact_number(value)) for value in result["bbox"])
        check(width >= 0 and height >= 0, f"a box of the size {width} x {height}")
        number = exact_number(id_)
        check(number in sizes, f"a result of the image {id_!r:.80}")
        limits = np.array([*sizes[int(number)]] * 2, np.float32)
        box = np.clip(np.array([x, y, x + width, y + height], np.float32), 0, limits)
        if box[0] < box[2] and box[1] < box[3]:
            boxes[int(number)].append([x, y, x + width, y + height])
            scores[int(number)].append(result["score"])
        else:
            outside += 1
    return boxes, scores, outside


def _results(read: Tree) -> list[tuple[Any, dict[str, Any]]]:
    """Image ids with results, from a list or from a dictionary by image id."""
    if isinstance(read, dict):
        return [(id_, result) for id_, of_image in read.items() for result in of_image]
    return [(result["image_id"], result) for result in read]
