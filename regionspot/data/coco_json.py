"""COCO and LVIS annotation files, read once, checked whole, and held as a few small records.

Both formats are one format here: LVIS adds a category's `frequency`, an image's `neg_category_ids`
and `not_exhaustive_category_ids`, and names its pictures by `coco_url` alone. V3Det's `"novel":
true` marks the classes of its open-vocabulary split. OpenImages' `isgroupof` counts as a crowd.

Fields are read by the rule of `regionspot.data.json_reading`. Ids are whole numbers of any size or
texts; one record finds another also where one writes 7 and the other "7".
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from regionspot.data.json_reading import (
    FieldError,
    Id,
    id_key,
    id_order,
    identifier,
    integer,
    number,
    numbers,
    printable,
    read_json,
    required,
    shown,
    text,
    truth,
)
from regionspot.data.picture_files import PictureFinder, checked_name, last_part
from regionspot.errors import MAX_NAMED, InputError, first_few

Frequency = Literal["r", "c", "f"]
Box = tuple[float, float, float, float]
# as the file has it: polygons in image pixels or a COCO RLE, judged where masks are evaluated
Segmentation = Any

MAX_SIDE = 1_000_000
MAX_COORDINATE = 1e9
# a width or height of this or more, below 0, is a rounding error of the tool that wrote it
ROUNDED_TO_ZERO = -0.01
NORMALIZED_MAX = 1.5
GROUP_KEYS = frozenset({"isgroupof", "IsGroupOf", "is_group_of"})
UNKNOWN = (-1, "-1")  # OpenImages' value for what nobody has looked at


@dataclass(frozen=True, slots=True)
class Category:
    """One class. `frequency` is LVIS's rare / common / frequent; `novel` marks classes held out of
    training.
    """

    id: Id
    name: str
    frequency: Frequency | None = None
    novel: bool = False


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One picture. `file_name` is as the file has it (its `coco_url` if there is no name); see
    `image_path`.

    The two LVIS lists are None when the file does not have them: it then makes no federated claims.
    """

    id: Id
    file_name: str
    width: int
    height: int
    neg_category_ids: tuple[Id, ...] | None = None
    not_exhaustive_category_ids: tuple[Id, ...] | None = None


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object. `box` is xyxy in image pixels (the file's is xywh); it may be empty or reach
    outside the image.

    `image_id` and `category_id` are spelled as in the records that they name.
    """

    id: Id
    image_id: Id
    category_id: Id
    box: Box
    area: float
    segmentation: Segmentation | None = None
    iscrowd: bool = False


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A set of annotated images: the records that COCO's format has, from a file of any format
    (`load_dataset`).

    Images and annotations keep the file's order; categories stand in the order of their ids.
    `annotations_by_image` has an entry, perhaps empty, for every image id.
    """

    path: Path
    image_root: Path
    images: tuple[ImageRecord, ...]
    categories: tuple[Category, ...]
    annotations_by_image: Mapping[Id, tuple[Annotation, ...]] = field(repr=False)

    @classmethod
    def load(
        cls, path: str | Path, image_root: str | Path | None = None, check_images: bool = True
    ) -> CocoDataset:
        """Reads and checks a COCO or LVIS annotation file.

        Args:
            path: the JSON.
            image_root: the directory its file names start from; by default the one that the JSON
                lies in.
            check_images: whether every picture must exist. Say False where only the annotations are
                used.

        Raises:
            InputError: the file is missing or no COCO JSON, a key or a picture is missing, two
                images are one file, an id is unknown or used twice, a field has no usable value, or
                boxes are fractions of the picture.
        """
        path = Path(path)
        content = _read_annotations(path)
        categories = _read_records(path, content, "categories", _category)
        category_ids = _References("category", (category.id for category in categories))
        images = _read_records(path, content, "images", lambda entry: _image(entry, category_ids))
        image_ids = _References("image", (image.id for image in images))
        spare_ids = _spare_ids(content["annotations"])
        annotations = _read_records(
            path,
            content,
            "annotations",
            lambda entry: _annotation(entry, image_ids, category_ids, spare_ids),
        )
        dataset = cls.from_records(path, image_root, images, categories, annotations)
        if check_images:
            dataset.check_images()
        return dataset

    @classmethod
    def from_records(
        cls,
        path: str | Path,
        image_root: str | Path | None,
        images: Sequence[ImageRecord],
        categories: Sequence[Category],
        annotations: Sequence[Annotation],
    ) -> CocoDataset:
        """Makes a data set of records that a reader has checked one by one; no id may be used
        twice.

        Args:
            path: of the file that they were read from, for messages.
            image_root: the directory that file names start from; None stands for the one that holds
                `path`.

        Raises:
            InputError: an annotation is of an unknown image or category, or boxes are fractions of
                the image.
        """
        path = Path(path)
        _check_scale(path, annotations)
        return cls(
            path,
            path.parent if image_root is None else Path(image_root),
            tuple(images),
            tuple(sorted(categories, key=lambda category: id_order(category.id))),
            _group_by_image(path, images, categories, annotations),
        )

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Different names in the order of `categories`: the vocabulary. Categories of one name
        share its entry.
        """
        return tuple(dict.fromkeys(category.name for category in self.categories))

    @cached_property
    def category_index(self) -> dict[Id, int]:
        """Category id -> index into `class_names`."""
        index = {name: position for position, name in enumerate(self.class_names)}
        return {category.id: index[category.name] for category in self.categories}

    @property
    def num_annotations(self) -> int:
        return sum(len(annotations) for annotations in self.annotations_by_image.values())

    def image_path(self, record: ImageRecord) -> Path:
        """Where a picture lies: `file_name` under the image root, where it need not exist.

        A URL, or an absolute path that does not exist here, is found by its longest ending that
        exists under the root: LVIS's URLs say `val2017/000000397133.jpg` whatever directory holds
        the pictures. A relative name is taken literally, with `/` for Windows' `\\` where that is
        needed.
        """
        return self._pictures.find(record.file_name) or self.image_root / record.file_name

    @cached_property
    def _pictures(self) -> PictureFinder:
        return PictureFinder(self.image_root)

    def check_images(self, missing_allowed: bool = False) -> None:
        """Checks that every picture exists and that no two images are one file.

        Raises:
            InputError: which ones do not, and what to do.
        """
        missing: list[ImageRecord] = []
        found: dict[str, ImageRecord] = {}
        for record in self.images:
            path = self._pictures.find(record.file_name)
            if path is None:
                missing.append(record)
                continue
            other = found.setdefault(os.path.normpath(path), record)
            if other is not record:
                raise InputError(
                    f"{self.path}: the images {shown(other.id)} ({printable(other.file_name)}) and "
                    f"{shown(record.id)} ({printable(record.file_name)}) are both the file {path}: "
                    "give each its own picture, or make them one image."
                )
        if missing and not missing_allowed:
            raise InputError(self._missing_images(missing))

    def _missing_images(self, missing: list[ImageRecord]) -> str:
        names = first_few(printable(record.file_name) for record in missing)
        told = (
            f"{self.path}: {len(missing)} of {len(self.images)} images are not under "
            f"{self.image_root}: {names}."
        )
        if not self.image_root.is_dir():
            return (
                f"{told} There is no such folder: name the one that holds them (--images, or "
                "datasets.N.images)."
            )
        if any(
            self._pictures.is_file(self.image_root / last_part(record.file_name))
            for record in missing[:MAX_NAMED]
        ):
            return (
                f"{told} Files with the last part of such a name lie directly in that folder, but "
                "a relative name is taken with its folders: correct file_name, or sort the "
                "pictures into these folders."
            )
        if len(missing) < len(self.images):
            return (
                f"{told} Put them there, or take them and their annotations out of the annotation "
                "file."
            )
        return (
            f"{told} Name the folder that holds them (the image root: --images, or "
            "datasets.N.images)."
        )


def _read_annotations(path: Path) -> dict[str, Any]:
    content = read_json(path, "the annotation file", "A COCO or LVIS annotation file")
    missing = {"images", "annotations", "categories"} - set(
        content if isinstance(content, dict) else ()
    )
    if missing:
        kind = "" if isinstance(content, dict) else f" but a {type(content).__name__}"
        raise InputError(
            f"{path} is no COCO or LVIS annotation file{kind}: it has no list "
            f"{first_few(sorted(missing))}."
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content[key], list):
            raise InputError(f"{path}: {key!r} must be a list, not {shown(content[key])}.")
    return cast(dict[str, Any], content)


class _Record(Protocol):
    @property
    def id(self) -> Id: ...


RecordT = TypeVar("RecordT", bound=_Record)


def _read_records(
    path: Path, content: dict[str, Any], key: str, read: Callable[[dict[str, Any]], RecordT]
) -> list[RecordT]:
    records = [
        _read_record(path, key, index, entry, read) for index, entry in enumerate(content[key])
    ]
    repeated = [i for i, n in Counter(id_key(record.id) for record in records).items() if n > 1]
    if repeated:
        raise InputError(
            f"{path}: {key} share the ids {first_few(map(shown, repeated))}; give each its own."
        )
    return records


def _read_record(
    path: Path, key: str, index: int, entry: Any, read: Callable[[dict[str, Any]], RecordT]
) -> RecordT:
    """`read(entry)`, with the file and the record added to its errors."""
    if not isinstance(entry, dict):
        raise InputError(
            f"{path}: {key}[{index}] must be an object with fields, not {shown(entry)}."
        )
    try:
        return read(entry)
    except FieldError as error:
        lacks = str(error).startswith("has no key")
        raise InputError(
            f"{path}: {_where(key, index, entry)}{' ' if lacks else ': '}{error}."
        ) from error


class _References:
    """Finds the id of the record that another record names, whatever way each spells it."""

    def __init__(self, what: str, ids: Iterable[Id]) -> None:
        self._what, self._ids = what, {id_key(one): one for one in ids}

    def find(self, value: Any, key: str) -> Id:
        found = self._ids.get(id_key(identifier(value, key)))
        if found is None:
            raise FieldError(f"{key}: there is no {self._what} {shown(value)}")
        return found

    def find_all(self, values: Any, key: str) -> tuple[Id, ...] | None:
        if values is None:
            return None
        if not isinstance(values, list):
            raise FieldError(f"{key}: must be a list of category ids, not {shown(values)}")
        return tuple(self.find(value, key) for value in values)


def _category(entry: dict[str, Any]) -> Category:
    frequency = entry.get("frequency")
    if frequency not in ("r", "c", "f", None):
        raise FieldError(f"frequency: must be 'r', 'c' or 'f', not {shown(frequency)}")
    return Category(
        identifier(required(entry, "id"), "id"),
        text(required(entry, "name"), "name"),
        frequency,
        truth(entry.get("novel"), "novel"),
    )


def _image(entry: dict[str, Any], categories: _References) -> ImageRecord:
    return ImageRecord(
        identifier(required(entry, "id"), "id"),
        _file_name(entry),
        _side(entry, "width"),
        _side(entry, "height"),
        categories.find_all(entry.get("neg_category_ids"), "neg_category_ids"),
        categories.find_all(
            entry.get("not_exhaustive_category_ids"), "not_exhaustive_category_ids"
        ),
    )


def _side(entry: dict[str, Any], key: str) -> int:
    side = integer(required(entry, key), key)
    if not 1 <= side <= MAX_SIDE:
        raise FieldError(f"{key}: must be 1 to {MAX_SIDE} pixels, not {shown(side)}")
    return side


def _file_name(entry: dict[str, Any]) -> str:
    name = entry.get("file_name")
    if name is None and entry.get("coco_url") is not None:
        name = entry["coco_url"]
    elif name is None:
        name = required(entry, "file_name")
    if not isinstance(name, str) or not name.strip():
        raise FieldError(f"file_name: must be text, not {shown(name)}")
    return checked_name(name)


def _annotation(
    entry: dict[str, Any], images: _References, categories: _References, spare_ids: Iterator[int]
) -> Annotation:
    x, y, width, height = _bbox(entry)
    own_id, area = entry.get("id"), entry.get("area")
    return Annotation(
        next(spare_ids) if own_id is None else identifier(own_id, "id"),
        images.find(required(entry, "image_id"), "image_id"),
        categories.find(required(entry, "category_id"), "category_id"),
        (x, y, x + width, y + height),
        width * height if area is None else _area(area),
        entry.get("segmentation") or None,
        truth(entry.get("iscrowd"), "iscrowd") or _is_group(entry),
    )


def _is_group(entry: dict[str, Any]) -> bool:
    keys = () if GROUP_KEYS.isdisjoint(entry) else GROUP_KEYS.intersection(entry)
    return any(entry[key] not in UNKNOWN and truth(entry[key], key) for key in keys)


def _bbox(entry: dict[str, Any]) -> tuple[float, float, float, float]:
    """[x, y, width, height] in pixels; a width or height a rounding error below 0 is 0."""
    x, y, width, height = numbers(required(entry, "bbox"), "bbox", 4)
    if min(width, height) < ROUNDED_TO_ZERO:
        raise FieldError(f"bbox: width and height must be 0 or more, not {shown(entry['bbox'])}")
    if max(abs(x), abs(y), width, height) > MAX_COORDINATE:
        raise FieldError(f"bbox: {shown(entry['bbox'])} is far beyond any picture")
    return x, y, max(width, 0.0), max(height, 0.0)


def _area(value: Any) -> float:
    area = number(value, "area")
    if area < 0:
        raise FieldError(f"area: must be 0 or more, not {shown(value)}")
    return area


def _spare_ids(entries: list[Any]) -> Iterator[int]:
    """Ids for annotations that have none: the numbers that follow the largest one there is, looked
    for when asked.
    """
    keys = (_id_key_or_none(entry.get("id")) for entry in entries if isinstance(entry, dict))
    yield from count(max((key for key in keys if isinstance(key, int)), default=0) + 1)


def _id_key_or_none(value: Any) -> Id | None:
    try:
        return id_key(identifier(value, "id"))
    except FieldError:  # refused where the record is read
        return None


def _group_by_image(
    path: Path,
    images: Sequence[ImageRecord],
    categories: Sequence[Category],
    annotations: Sequence[Annotation],
) -> dict[Id, tuple[Annotation, ...]]:
    grouped: dict[Id, list[Annotation]] = {image.id: [] for image in images}
    known = {category.id for category in categories}
    for annotation in annotations:
        if annotation.image_id not in grouped:
            raise InputError(
                f"{path}: annotation {shown(annotation.id)}: no image {shown(annotation.image_id)}."
            )
        if annotation.category_id not in known:
            raise InputError(
                f"{path}: annotation {shown(annotation.id)}: no category "
                f"{shown(annotation.category_id)}."
            )
        grouped[annotation.image_id].append(annotation)
    return {image_id: tuple(group) for image_id, group in grouped.items()}


def _check_scale(path: Path, annotations: Sequence[Annotation]) -> None:
    if annotations and all(max(annotation.box) <= NORMALIZED_MAX for annotation in annotations):
        boxes = np.array([annotation.box for annotation in annotations])
        if are_normalized(boxes):
            raise InputError(f"{path}: annotations: {NORMALIZED_HINT}")


NORMALIZED_HINT = (
    "no box reaches further than a pixel from the corner, so they seem to be fractions of the "
    "picture: pixels are wanted, so multiply x and width by the picture's width, y and height by "
    "its height."
)


def are_normalized(boxes: npt.NDArray[np.float64]) -> bool:
    """Whether (N, 4) xyxy boxes seem to be fractions of their pictures: none beyond a pixel or so,
    not all whole.
    """
    return bool(len(boxes) and boxes.max() <= NORMALIZED_MAX and (boxes % 1).any())


def _where(key: str, index: int, entry: dict[str, Any]) -> str:
    singular = {"categories": "category", "images": "image", "annotations": "annotation"}[key]
    own_id = entry.get("id")
    return f"{singular} {shown(own_id)}" if _is_id(own_id) else f"{key}[{index}]"


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
