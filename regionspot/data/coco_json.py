"""COCO and LVIS annotation files, read once, checked whole, and spoken of as a few small records.

Both formats are one format here: LVIS adds a category's `frequency`, an image's `neg_category_ids` and
`not_exhaustive_category_ids`, and names its pictures by `coco_url` alone. One key is our own: `"novel": true` in a
category marks a class that training must not see.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast
from urllib.parse import urlparse

from regionspot.errors import InputError

Frequency = Literal["r", "c", "f"]
Box = tuple[float, float, float, float]
Segmentation = list[list[float]] | dict[str, Any]  # polygons in image pixels, or a COCO RLE

MAX_NAMED = 5  # so many culprits are named in an error; the rest are counted


@dataclass(frozen=True, slots=True)
class Category:
    """One class. `frequency` is LVIS's rare / common / frequent; `novel` classes are not for training."""

    id: int
    name: str
    frequency: Frequency | None = None
    novel: bool = False


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One picture. `file_name` is relative to the image root.

    The two LVIS lists are None when the file does not have them: it then makes no federated claims.
    """

    id: int
    file_name: str
    width: int
    height: int
    neg_category_ids: tuple[int, ...] | None = None
    not_exhaustive_category_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object. `box` is xyxy in image pixels (the file's is xywh); it may be empty or reach outside the image."""

    id: int
    image_id: int
    category_id: int
    box: Box
    area: float
    segmentation: Segmentation | None = None
    iscrowd: bool = False


@dataclass(frozen=True)
class CocoDataset:
    """An annotation file. Images and annotations keep the file's order; categories stand in the order of their ids.

    `annotations_by_image` has an entry, perhaps empty, for every image id.
    """

    path: Path
    image_root: Path
    images: tuple[ImageRecord, ...]
    categories: tuple[Category, ...]
    annotations_by_image: Mapping[int, tuple[Annotation, ...]] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path, image_root: str | Path | None = None, check_images: bool = True) -> CocoDataset:
        """Read and check an annotation file.

        Args:
            path: the JSON.
            image_root: the directory its file names start from; by default the one that the JSON lies in.
            check_images: whether every picture must be there. Say False where only the annotations are used.

        Raises:
            InputError: the file is missing or no COCO JSON, a key or a picture is missing, an id is unknown or used
                twice, or a box is not four finite numbers with width and height of 0 or more.
        """
        path = Path(path)
        content = _read_annotations(path)
        categories = sorted(_read_records(path, content, "categories", _category), key=lambda c: c.id)
        images = _read_records(path, content, "images", _image)
        annotations = _read_records(path, content, "annotations", _annotation)
        grouped = _group_by_image(path, images, categories, annotations)
        root = path.parent if image_root is None else Path(image_root)
        dataset = cls(path, root, tuple(images), tuple(categories), grouped)
        if check_images:
            dataset._check_images()
        return dataset

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of `categories`: the vocabulary that class indices point into."""
        return tuple(category.name for category in self.categories)

    @cached_property
    def category_index(self) -> dict[int, int]:
        """Category id -> index into `categories` and `class_names`."""
        return {category.id: index for index, category in enumerate(self.categories)}

    @property
    def num_annotations(self) -> int:
        return sum(len(annotations) for annotations in self.annotations_by_image.values())

    def image_path(self, record: ImageRecord) -> Path:
        """Where a picture lies: `file_name` under the image root or, if there is none, its last part alone.

        The second place serves LVIS, whose URLs say `val2017/000000397133.jpg` whatever directory holds the pictures.
        """
        path = self.image_root / record.file_name
        flat = self.image_root / path.name
        return flat if not path.exists() and flat.exists() else path

    def _check_images(self) -> None:
        missing = [record.file_name for record in self.images if not self.image_path(record).is_file()]
        if missing:
            raise InputError(
                f"{self.path}: {len(missing)} of {len(self.images)} images are not under {self.image_root}: "
                f"{first_few(missing)}. Name the directory that holds them (the image root)."
            )


def read_json(path: Path, what: str, wanted: str) -> Any:
    """The content of a JSON file.

    Args:
        what: the file, as an error names it.
        wanted: what it should have been.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}). {wanted} is wanted.") from error


def _read_annotations(path: Path) -> dict[str, Any]:
    content = read_json(path, "the annotation file", "A COCO or LVIS annotation file")
    missing = {"images", "annotations", "categories"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise InputError(f"{path} is no COCO or LVIS annotation file: it has no list {first_few(sorted(missing))}.")
    return cast(dict[str, Any], content)


def _read_records(path: Path, content: dict[str, Any], key: str, read: Any) -> list[Any]:
    if not isinstance(content[key], list):
        raise InputError(f"{path}: {key!r} must be a list.")
    records = [_read_record(path, key, index, entry, read) for index, entry in enumerate(content[key])]
    repeated = [i for i, n in Counter(record.id for record in records).items() if n > 1]
    if repeated:
        raise InputError(f"{path}: {key} share the ids {first_few(repeated)}; give each its own.")
    return records


def _read_record(path: Path, key: str, index: int, entry: Any, read: Any) -> Any:
    """`read(entry)`; what it complains about is told with the entry's name."""
    try:
        return read(entry)
    except KeyError as error:
        raise InputError(f"{path}: {_where(key, index, entry)} has no key {error}.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: {_where(key, index, entry)}: {error}.") from error


def _category(entry: dict[str, Any]) -> Category:
    frequency = entry.get("frequency")
    if frequency not in ("r", "c", "f", None):
        raise ValueError(f"frequency must be 'r', 'c' or 'f', not {frequency!r}")
    name = entry["name"]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name must be a word, not {name!r}")
    return Category(int(entry["id"]), name, frequency, bool(entry.get("novel", False)))


def _image(entry: dict[str, Any]) -> ImageRecord:
    width, height = int(entry["width"]), int(entry["height"])
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be 1 pixel or more, not {width} x {height}")
    return ImageRecord(
        int(entry["id"]),
        _file_name(entry),
        width,
        height,
        _ids(entry.get("neg_category_ids")),
        _ids(entry.get("not_exhaustive_category_ids")),
    )


def _file_name(entry: dict[str, Any]) -> str:
    if "file_name" not in entry and "coco_url" in entry:
        return str(PurePosixPath(*PurePosixPath(urlparse(entry["coco_url"]).path).parts[-2:]))
    return str(entry["file_name"])


def _ids(values: Iterable[Any] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(int(value) for value in values)


def _annotation(entry: dict[str, Any]) -> Annotation:
    x, y, width, height = box = [float(value) for value in entry["bbox"]]
    if not all(map(math.isfinite, box)) or width < 0 or height < 0:
        raise ValueError(f"bbox must be finite [x, y, width, height] of size 0 or more, not {entry['bbox']}")
    return Annotation(
        int(entry["id"]),
        int(entry["image_id"]),
        int(entry["category_id"]),
        (x, y, x + width, y + height),
        float(entry.get("area", width * height)),
        entry.get("segmentation") or None,
        bool(entry.get("iscrowd", 0)),
    )


def _group_by_image(
    path: Path, images: list[ImageRecord], categories: list[Category], annotations: list[Annotation]
) -> dict[int, tuple[Annotation, ...]]:
    category_ids = {category.id for category in categories}
    grouped: dict[int, list[Annotation]] = {image.id: [] for image in images}
    for annotation in annotations:
        if annotation.image_id not in grouped:
            raise InputError(
                f"{path}: annotation {annotation.id} is of image {annotation.image_id}, which is not there."
            )
        if annotation.category_id not in category_ids:
            raise InputError(
                f"{path}: annotation {annotation.id} is of category {annotation.category_id}, which is not there."
            )
        grouped[annotation.image_id].append(annotation)
    for image in images:
        listed = (*(image.neg_category_ids or ()), *(image.not_exhaustive_category_ids or ()))
        unknown = [i for i in listed if i not in category_ids]
        if unknown:
            raise InputError(f"{path}: image {image.id} lists the unknown categories {first_few(unknown)}.")
    return {image_id: tuple(group) for image_id, group in grouped.items()}


def _where(key: str, index: int, entry: Any) -> str:
    singular = {"categories": "category", "images": "image", "annotations": "annotation"}[key]
    return f"{singular} {entry['id']}" if isinstance(entry, dict) and "id" in entry else f"{key}[{index}]"


def first_few(values: Iterable[object]) -> str:
    """The first few of `values` in words, and how many more there are."""
    named = [str(value) for value in values]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return ", ".join(named[:MAX_NAMED]) + more
