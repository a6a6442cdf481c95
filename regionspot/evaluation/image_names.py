"""Finds the images that a detector's file means: by id, or by file name where that is what its ids
are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from regionspot.data.coco_json import CocoDataset, ImageRecord
from regionspot.data.json_reading import Id, id_key, id_order, shown
from regionspot.data.picture_files import last_part
from regionspot.errors import InputError, first_few

MAX_DIGITS = 100


@dataclass(frozen=True)
class FoundImages:
    """Image ids of a data set by their spelling elsewhere; `named_by` is "" where that is by id."""

    ids: Mapping[Id, Id]
    named_by: str = ""


def resolve_image_ids(path: Path, spelled: Iterable[Id], dataset: CocoDataset) -> FoundImages:
    """Finds the image that each spelling means.

    Ids come first. Otherwise one of these must explain every spelling in the file: ids with leading
    zeros, file names, file names without their ending.

    Raises:
        InputError: an image that the data set does not have, or two explanations that name
            different images.
    """
    wanted = set(spelled)
    by_id = {id_key(image.id): image.id for image in dataset.images}
    unknown = sorted((one for one in wanted if id_key(one) not in by_id), key=id_order)
    if not unknown:
        by_ids = {one: by_id[id_key(one)] for one in wanted}
        _check_not_stems(path, by_ids, dataset)
        return FoundImages(by_ids)
    names = {
        "ids with leading zeros": {one: by_id.get(_without_zeros(one)) for one in wanted},
        "file names": _named(dataset, lambda name: name),
        "file names without ending": _named(dataset, lambda name: os.path.splitext(name)[0]),
    }
    found: list[FoundImages] = []
    for named_by, ids in names.items():
        explained = {one: image_id for one in wanted if (image_id := ids.get(one)) is not None}
        if len(explained) == len(wanted):
            found.append(FoundImages(explained, named_by))
    if not found:
        raise InputError(
            f"{path} has proposals for images that {dataset.path} does not list: ids "
            f"{first_few(map(shown, unknown))}. Are they of another split?"
        )
    if any(other.ids != found[0].ids for other in found):
        raise InputError(
            f"{path}: its image ids, such as {shown(unknown[0])}, can be "
            f"{' and '.join(one.named_by for one in found)} of {dataset.path}, which are different "
            "images: write the image ids of the annotation file."
        )
    return found[0]


def _check_not_stems(path: Path, by_ids: Mapping[Id, Id], dataset: CocoDataset) -> None:
    """Raises InputError where spellings that are ids are the file names of other images as well."""
    if not any(isinstance(one, str) for one in by_ids):
        return
    stems = _named(dataset, lambda name: os.path.splitext(name)[0])
    if all(stems.get(one) is not None for one in by_ids) and any(
        stems[one] != found for one, found in by_ids.items()
    ):
        raise InputError(
            f"{path}: its image ids are the file names of other images of {dataset.path} as well: "
            "write whole numbers as ids, in COCO's format of results"
        )


def _without_zeros(spelled: Id) -> Id:
    is_number = (
        isinstance(spelled, str)
        and len(spelled) <= MAX_DIGITS
        and spelled.isascii()
        and spelled.isdigit()
    )
    return int(spelled) if is_number else spelled


def _named(dataset: CocoDataset, shorten: Callable[[str], str]) -> dict[Id, Id | None]:
    """Image ids by file name, with and without folders; None for a name that several images
    have.
    """
    found: dict[Id, Id | None] = {}
    for image in dataset.images:
        for name in {shorten(one) for one in _names(image)}:
            found[name] = None if name in found else image.id
    return found


def _names(image: ImageRecord) -> tuple[str, str]:
    return image.file_name, last_part(image.file_name)
