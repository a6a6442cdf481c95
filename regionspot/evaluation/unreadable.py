"""Pictures that cannot be used, found before anything is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from regionspot.data.coco_json import CocoDataset, ImageRecord
from regionspot.data.extraction import read_upright
from regionspot.data.json_reading import Id
from regionspot.errors import InputError, first_few
from regionspot.evaluation.proposals import Proposals
from regionspot.progress import Progress
from regionspot.threads import default_threads

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ReadablePart:
    """What is left of a data set and its regions without pictures that cannot be used.

    Args:
        skipped: why each of the others cannot, with its path.
    """

    dataset: CocoDataset
    proposals: Proposals
    skipped: tuple[str, ...] = ()


def readable_part(
    dataset: CocoDataset, proposals: Proposals, limit: int = 0, progress: bool = True
) -> ReadablePart:
    """Reads every picture that has regions, so that a bad one is found before an evaluation and not
    in its midst.

    Args:
        limit: leave out this many pictures, with their objects, at most.
        progress: show on stderr how far it is.

    Raises:
        InputError: more than `limit` are missing, damaged, or not of the size that the annotations
            are for.
    """
    records = [record for record in dataset.images if len(proposals.boxes[record.id])]
    problems: dict[int, str] = {}
    shows = Progress("check", len(records), "images") if progress else contextlib.nullcontext()
    with ThreadPoolExecutor(default_threads()) as pool, shows as bar:
        try:
            for index, problem in enumerate(
                pool.map(lambda record: _problem(dataset, record), records)
            ):
                if bar:
                    bar.update(index + 1)
                if problem:
                    problems[index] = problem
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if len(problems) > limit:
        raise InputError(_too_many(len(problems), list(problems.values()), len(records), limit))
    return _without(
        dataset, proposals, [records[index] for index in problems], tuple(problems.values())
    )


def _problem(dataset: CocoDataset, record: ImageRecord) -> str:
    path = dataset.image_path(record)
    try:
        read_upright(path, (record.height, record.width))
    except InputError as error:
        return str(error) if str(path) in str(error) else f"{path}: {error}"
    return ""


def _too_many(count: int, problems: Sequence[str], total: int, limit: int) -> str:
    if count == 1:
        return (
            f"{problems[0].removesuffix('.')}. To leave such pictures out, allow some: "
            "--skip-unreadable 1"
        )
    more = (
        f"more than --skip-unreadable {limit} allows"
        if limit
        else f"to leave them out: --skip-unreadable {count}"
    )
    return f"{count} of {total} pictures cannot be used, {more}: {first_few(problems)}"


def _without(
    dataset: CocoDataset, proposals: Proposals, bad: Sequence[ImageRecord], skipped: tuple[str, ...]
) -> ReadablePart:
    if not bad:
        return ReadablePart(dataset, proposals)
    left_out = {record.id for record in bad}
    kept = tuple(record for record in dataset.images if record.id not in left_out)
    annotations = {record.id: dataset.annotations_by_image[record.id] for record in kept}

    def of_kept(values: dict[Id, T] | None) -> dict[Id, T] | None:
        return None if values is None else {record.id: values[record.id] for record in kept}

    return ReadablePart(
        replace(dataset, images=kept, annotations_by_image=annotations),
        replace(
            proposals,
            boxes={record.id: proposals.boxes[record.id] for record in kept},
            scores=of_kept(proposals.scores),
            annotations=of_kept(proposals.annotations),
        ),
        skipped,
    )
