"""Measures a model behind a gateway, from whole answers: what its clients get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from regionspot.data.coco_json import CocoDataset, ImageRecord
from regionspot.data.json_reading import printable
from regionspot.errors import InputError
from regionspot.evaluation.average_precision import Rules
from regionspot.evaluation.detections import Detections
from regionspot.evaluation.evaluator import MeasuredModel, ScoredImage, evaluate_scores
from regionspot.evaluation.proposals import Proposals
from regionspot.evaluation.unreadable import ReadablePart, readable_part
from regionspot.progress import Progress
from regionspot.serving.client import RegionClient, make_question
from regionspot.serving.contract import Limits
from regionspot.serving.conversation import ServerInfo
from regionspot.structures import RegionPredictions

TAUGHT_AT_ONCE = 8
"""Words that a server learns in one request: a full-size text encoder on a CPU takes seconds for
each."""


def evaluate_through(
    client: RegionClient,
    dataset: CocoDataset,
    proposals: Proposals,
    rules: Rules = "lvis",
    masks: bool = False,
    at_once: int = 8,
    skip_unreadable: int = 0,
) -> tuple[Mapping[str, Any], Detections]:
    """Measures the head that answers a client; see `evaluate_methods`.

    The words are the name of a registered vocabulary where one has just the classes of the data
    set; otherwise they are sent, and learned by the server beforehand as far as it allows.

    Args:
        at_once: images under way.

    Raises:
        InputError: more regions or classes than the server takes, pictures that cannot be used.
        ServingError: the server refuses or fails.
    """
    info = client.info()
    _check(dataset, proposals, info.limits, at_once)
    part = readable_part(dataset, proposals, skip_unreadable)
    words = _words_of(dataset.class_names, info)
    model = MeasuredModel(
        info.model, f"{info.runtime} behind a gateway", info.precision, "the server's own"
    )
    scored = _scored(client, part, words, masks, at_once)
    return evaluate_scores(model, part, scored, rules, masks)


def _check(dataset: CocoDataset, proposals: Proposals, limits: Limits, at_once: int) -> None:
    if at_once < 1:
        raise InputError(f"--batch-size must be 1 or more, not {at_once}")
    num_words = len(dataset.class_names)
    most_words = min(limits.max_words, limits.max_top_k)
    if num_words > most_words:
        raise InputError(
            f"{dataset.path} has {num_words} classes, and the server answers with {most_words} at "
            "most: measure it by Triton's own port, or raise its limits max_words and max_top_k"
        )
    most_regions = max(map(len, proposals.boxes.values()), default=0)
    if most_regions > limits.max_regions:
        raise InputError(
            f"an image has {most_regions} regions, and the server takes {limits.max_regions} at "
            "most: give fewer proposals, or raise its limit max_regions"
        )


def _words_of(names: Sequence[str], info: ServerInfo) -> str | tuple[str, ...]:
    for registered, words in info.vocabularies.items():
        if words == tuple(names):
            return registered
    return tuple(names)


def _scored(
    client: RegionClient,
    part: ReadablePart,
    words: str | tuple[str, ...],
    masks: bool,
    at_once: int,
) -> Iterator[ScoredImage]:
    """Every image that has regions, as its answer comes."""
    records = [record for record in part.dataset.images if len(part.proposals.boxes[record.id])]
    if not isinstance(words, str) and records:
        _teach(client, part.dataset, records[0], words)

    def ask(record: ImageRecord) -> ScoredImage:
        path = part.dataset.image_path(record)
        boxes = part.proposals.boxes[record.id]
        top_k = len(part.dataset.class_names)
        question = make_question(path, boxes, words, top_k=top_k, return_masks=masks)
        found = client.ask(question).predictions
        if (found.image_height, found.image_width) != (record.height, record.width):
            raise InputError(f"{printable(record.file_name)} is not of the size of its record")
        return ScoredImage(record, boxes, _probabilities(found), found.masks)

    pool = ThreadPoolExecutor(at_once)
    try:
        with Progress("evaluate", len(records), "images") as bar:
            for done, image in enumerate(pool.map(ask, records), start=1):
                bar.update(done)
                yield image
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _teach(
    client: RegionClient, dataset: CocoDataset, record: ImageRecord, words: Sequence[str]
) -> None:
    """Has the server encode words a part at a time, as it wants where many are new to it."""
    image = client.encode(dataset.image_path(record))
    step = min(client.info().limits.max_new_words, TAUGHT_AT_ONCE)
    for start in range(0, len(words), step):
        client.ask(make_question(image, [], words[start : start + step]))


def _probabilities(found: RegionPredictions) -> Any:
    """(n, V) in the order of the classes."""
    table = np.zeros((len(found), len(found.class_names)), np.float32)
    np.put_along_axis(table, found.top_class_ids.astype(np.int64), found.top_scores, axis=1)
    return table
