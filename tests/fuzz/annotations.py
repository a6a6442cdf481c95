"""Annotation files through `CocoDataset.load`, `load_training_set` and the evaluation.

A file that is accepted must say what a plain reading of the same JSON says, and its own objects
must be found by it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from regionspot.data.coco_json import Annotation, Category, CocoDataset, ImageRecord
from regionspot.data.dataset import TrainingSet, load_training_set
from regionspot.errors import RegionSpotError
from regionspot.evaluation.average_precision import IouType, evaluate_detections
from regionspot.evaluation.segmentations import ground_truth_masks
from regionspot.masks import rle_area
from tests.fuzz.documents import FREQUENCIES, annotation_file
from tests.fuzz.reference import (
    check_flag,
    check_float,
    check_id,
    check_integer,
    check_text,
    exact_number,
    id_meaning,
)
from tests.fuzz.target import attempt, check, write
from tests.fuzz.trees import Note, Tree, encode, mutate_values, respell

ROUNDING = 0.01
SMALLEST_AREA = 1e-6


class Annotations:
    """The target."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for index in range(3):
            Image.new("RGB", (64 + index, 48)).save(directory / f"{index}.png")

    def run(self, rng: random.Random, note: Note) -> bool:
        tree = plain = annotation_file(rng)
        how = rng.choice(("whole", "respelt", *["values"] * 6, "text", "both"))
        note(how)
        if how == "respelt":
            tree = respell(tree, rng)
        elif how in ("values", "both"):
            tree = mutate_values(tree, rng, note, rng.choice((1, 1, 1, 2, 4)))
        content = encode(tree, rng, note, damage=how in ("text", "both"))
        path = write(self._directory, "annotations.json", content)
        check_images = rng.random() < 0.5
        dataset = attempt(lambda: CocoDataset.load(path, check_images=check_images))
        if isinstance(dataset, RegionSpotError):
            check(how != "whole" or not _is_plain(content), f"a right file is refused: {dataset}")
            return False
        check_dataset(dataset, json.loads(content))
        if how == "respelt":
            self._check_same_masks(dataset, plain)
        if check_images:
            _check_pictures(dataset)
            self._check_training(path, dataset)
        else:
            check_perfect_detections(dataset)
        return True

    def _check_same_masks(self, dataset: CocoDataset, plain: Tree) -> None:
        """The masks of a file in another spelling are those of the file."""
        path = write(self._directory, "plain.json", json.dumps(plain).encode())
        masks = attempt(lambda: ground_truth_masks(dataset))
        if not isinstance(masks, RegionSpotError):
            check(
                masks == ground_truth_masks(CocoDataset.load(path, check_images=False)),
                "masks of another shape",
            )

    def _check_training(self, path: Path, dataset: CocoDataset) -> None:
        training = attempt(lambda: load_training_set("fuzz", path))
        if isinstance(training, TrainingSet):
            check_training_set(training, dataset)


def check_dataset(dataset: CocoDataset, read: Tree) -> None:
    """Every record says what its entry in the JSON says, and none is lost."""
    check(isinstance(read, dict), "a document that is no dictionary was accepted")
    images, categories, annotations = read["images"], read["categories"], read["annotations"]
    check(len(dataset.images) == len(images), f"{len(dataset.images)} images of {len(images)}")
    check(
        len(dataset.categories) == len(categories),
        f"{len(dataset.categories)} categories of {len(categories)}",
    )
    check(
        dataset.num_annotations == len(annotations),
        f"{dataset.num_annotations} annotations of {len(annotations)}",
    )
    for image, entry in zip(dataset.images, images, strict=True):
        _check_image(image, entry)
    by_id = {id_meaning(category.id): category for category in dataset.categories}
    check(len(by_id) == len(categories), "categories share an id")
    check(
        [*by_id] == sorted(by_id, key=lambda key: (isinstance(key, str), key)),
        "categories are not in order",
    )
    for entry in categories:
        _check_category(by_id[id_meaning(entry["id"])], entry)
    check(
        set(dataset.annotations_by_image) == {image.id for image in dataset.images},
        "an image has no entry",
    )
    check(
        len({id_meaning(image.id) for image in dataset.images}) == len(images), "images share an id"
    )
    _check_annotations(dataset, annotations)


def _check_annotations(dataset: CocoDataset, annotations: list[dict[str, Any]]) -> None:
    """The annotations of each image are those of the file that name it, in the file's order."""
    wanted: dict[int | str, list[Any]] = {id_meaning(image.id): [] for image in dataset.images}
    for entry in annotations:
        wanted[id_meaning(entry["image_id"])].append(entry)
    category_ids = {category.id for category in dataset.categories}
    for image_id, of_image in dataset.annotations_by_image.items():
        entries = wanted[id_meaning(image_id)]
        check(
            len(of_image) == len(entries),
            f"image {image_id} has {len(of_image)} annotations of {len(entries)}",
        )
        for annotation, entry in zip(of_image, entries, strict=True):
            check(annotation.image_id == image_id, "an annotation of another image")
            check(annotation.category_id in category_ids, "an annotation of an unknown category")
            _check_annotation(annotation, entry)
    ids = [
        id_meaning(a.id)
        for annotations in dataset.annotations_by_image.values()
        for a in annotations
    ]
    check(len(set(ids)) == len(ids), "annotations share an id")


def check_training_set(training: TrainingSet, dataset: CocoDataset) -> None:
    """The regions are those of the data set that can be learnt from, in their order."""
    check(len(set(training.class_names)) == len(training.class_names), "a class is named twice")
    names = {category.id: category.name for category in dataset.categories}
    expected = []
    for image in dataset.images:
        limits = np.array([image.width, image.height] * 2)
        for a in dataset.annotations_by_image[image.id]:
            box = np.clip(np.array(a.box, np.float32), 0, limits).astype(np.float32)
            if not a.iscrowd and box[0] < box[2] and box[1] < box[3]:
                expected.append((image.file_name, names[a.category_id], box.tolist()))
    of_regions = np.repeat(np.arange(len(training)), training.counts)
    found = [
        (training.file_names[image], training.class_names[class_id], box)
        for image, class_id, box in zip(
            of_regions, training.class_ids, training.boxes.tolist(), strict=True
        )
    ]
    check(found == expected, f"training learns {found} instead of {expected}")


def check_perfect_detections(dataset: CocoDataset) -> None:
    """Detections that are the ground truth itself have an AP of 100, by boxes and, where there are
    any, by masks.
    """
    objects = [
        a
        for image in dataset.images
        for a in dataset.annotations_by_image[image.id]
        if not a.iscrowd
    ]
    if all((a.box[2] - a.box[0]) * (a.box[3] - a.box[1]) > SMALLEST_AREA for a in objects):
        _check_perfect(dataset, [_detection(a) for a in objects], "bbox")
    masks = attempt(lambda: ground_truth_masks(dataset))
    if isinstance(masks, RegionSpotError):
        return
    sizes = {image.id: [image.height, image.width] for image in dataset.images}
    everything = [a for image in dataset.images for a in dataset.annotations_by_image[image.id]]
    check(
        all(m["size"] == sizes[a.image_id] for a, m in zip(everything, masks, strict=True)),
        "a mask of another size",
    )
    if all(rle_area(mask) for mask in masks):
        pairs = [(a, mask) for a, mask in zip(everything, masks, strict=True) if not a.iscrowd]
        _check_perfect(
            dataset, [_detection(a) | {"segmentation": mask} for a, mask in pairs], "segm"
        )


def _check_perfect(
    dataset: CocoDataset, detections: list[dict[str, Any]], iou_type: IouType
) -> None:
    figures = attempt(lambda: evaluate_detections(dataset, detections, "coco", iou_type))
    if not isinstance(figures, RegionSpotError):
        wanted = 100.0 if detections else None
        found = figures["AP"]
        right = found == wanted or (
            found is not None and wanted is not None and abs(found - wanted) < 1e-6
        )
        check(right, f"perfect detections have the {iou_type} AP {found}")


def _detection(annotation: Annotation) -> dict[str, Any]:
    x0, y0, x1, y1 = annotation.box
    ids = {"image_id": annotation.image_id, "category_id": annotation.category_id}
    return ids | {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": 0.5}


def _check_image(image: ImageRecord, entry: dict[str, Any]) -> None:
    check_id(image.id, entry["id"], "an image's id")
    check_integer(image.width, entry["width"], "width")
    check_integer(image.height, entry["height"], "height")
    check(min(image.width, image.height) > 0, f"an image of {image.width} x {image.height}")
    name = entry.get("coco_url") if entry.get("file_name") is None else entry["file_name"]
    check_text(image.file_name, name, "a file name")
    check(
        bool(image.file_name.strip()) and "\0" not in image.file_name,
        f"the file name {image.file_name!r}",
    )
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        found, given = getattr(image, key), entry.get(key)
        if found is None or given is None:
            check(found is given is None, f"{key} {given!r:.80} is read as {found}")
        else:
            check(isinstance(given, list), f"{key} {given!r:.80} is read as {found}")
            check(
                [*map(id_meaning, found)] == [*map(id_meaning, given)],
                f"{key} {given!r:.80} is read as {found}",
            )


def _check_category(category: Category, entry: dict[str, Any]) -> None:
    check_id(category.id, entry["id"], "a category's id")
    check_text(category.name, entry["name"], "a category's name")
    check(bool(category.name.strip()), "a blank name")
    category.name.encode()
    check(category.frequency == entry.get("frequency"), f"frequency {entry.get('frequency')!r:.80}")
    check(category.frequency in (*FREQUENCIES, None), f"frequency {category.frequency!r}")
    check_flag(category.novel, entry.get("novel"), "novel")


def _check_annotation(annotation: Annotation, entry: dict[str, Any]) -> None:
    """Its fields; without an id it may have any, and a width that is a rounding error below 0
    is 0.
    """
    if entry.get("id") is not None:
        check_id(annotation.id, entry["id"], "an annotation's id")
    check(
        id_meaning(annotation.category_id) == id_meaning(entry["category_id"]), "another category"
    )
    check(
        isinstance(entry["bbox"], list) and len(entry["bbox"]) == 4,
        f"bbox {entry['bbox']!r:.80} was accepted",
    )
    x, y, width, height = (float(exact_number(value)) for value in entry["bbox"])
    check(width >= -ROUNDING and height >= -ROUNDING, f"bbox {entry['bbox']} was accepted")
    wanted = [x, y, x + max(width, 0.0), y + max(height, 0.0)]
    check(
        bool(np.isfinite(wanted).all()) and [*annotation.box] == wanted,
        f"bbox {entry['bbox']}: {annotation.box}",
    )
    if entry.get("area") is not None:
        check_float(annotation.area, entry["area"], "area")
    check(annotation.area >= 0, f"area {annotation.area}")
    check_flag(annotation.iscrowd, entry.get("iscrowd"), "iscrowd")


def _check_pictures(dataset: CocoDataset) -> None:
    paths = [dataset.image_path(image).resolve() for image in dataset.images]
    check(len(set(paths)) == len(paths), "two images are one file")
    check(all(path.is_file() for path in paths), "a picture that is not there")


def _is_plain(content: bytes) -> bool:
    return content.startswith((b"{", b"[")) and b"\0" not in content[:2]
