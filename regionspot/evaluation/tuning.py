"""Baselines at their best: each one's setting is chosen on pictures that the comparison does not
use.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.batches import RegionBatch
from regionspot.evaluation.evaluator import scored_batches
from regionspot.evaluation.methods import HEAD, METHODS, Method, candidates, ensemble
from regionspot.evaluation.proposals import Proposals, ground_truth_proposals
from regionspot.evaluation.top1 import is_right
from regionspot.evaluation.unreadable import readable_part
from regionspot.modeling.regionspot import RegionSpot
from regionspot.predictor import as_pipeline
from regionspot.structures import FloatArray, Vocabulary

TUNABLE = ("clip_crops", "roi_pooling", "mask_pooling", "head_and_crops")
ROUNDS = ((0.1, 0.25), (0.4, 0.25), (1.0, 0.0))
"""Successive halving: the part of the pictures that each round has seen at its end, and of settings
that it keeps.
"""


def first_with_objects(dataset: CocoDataset, count: int) -> CocoDataset:
    """The first `count` of its images that have objects."""
    with_objects = (image for image in dataset.images if dataset.annotations_by_image[image.id])
    images = tuple(itertools.islice(with_objects, count))
    annotations = {image.id: dataset.annotations_by_image[image.id] for image in images}
    return replace(dataset, images=images, annotations_by_image=annotations)


def tuned_methods(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    methods: Collection[str] = tuple(METHODS),
    batch_size: int = 8,
    progress: bool = True,
    skip_unreadable: int = 0,
) -> dict[str, Method]:
    """The named methods, each baseline at the setting whose top-1 accuracy on annotated boxes is
    highest.

    The settings are found by successive halving: all of them on a tenth of the pictures, the better
    quarter on more, the better of these on all. Crops in "head_and_crops" are those that are best
    alone.

    Args:
        dataset: training pictures: what is measured afterwards must not be among them.
        vocabulary: `dataset.class_names`, with their embeddings.
        methods: keys of `METHODS`.
        skip_unreadable: leave out so many pictures at most that cannot be read.

    Raises:
        InputError: no annotated box among them, or more pictures that cannot be read.
    """
    proposals = ground_truth_proposals(dataset)
    images = tuple(image for image in dataset.images if len(proposals.boxes[image.id]))
    part = readable_part(
        replace(dataset, images=images), proposals, skip_unreadable, progress
    ).dataset
    if not part.images:
        raise InputError(
            f"{dataset.path} has no annotated box in a picture that can be read: no setting can be "
            "chosen on it"
        )
    wanted = {*methods, "clip_crops"} if "head_and_crops" in methods else {*methods}
    settings = {name: found for name, found in candidates(model.clip).items() if name in wanted}
    best = _best(model, part, vocabulary, proposals, settings, batch_size, progress)
    if "head_and_crops" in methods:
        both = ensemble(HEAD, best["clip_crops"])
        best["head_and_crops"] = replace(both, tuned_on=best["clip_crops"].tuned_on)
    return {name: best.get(name, METHODS[name]) for name in methods}


def _best(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    settings: Mapping[str, Sequence[Method]],
    batch_size: int,
    progress: bool,
) -> dict[str, Method]:
    """Of each baseline's settings. Every picture is encoded once for all of them."""
    pipeline = as_pipeline(model)
    left = {
        name: {method.description: method for method in of_baseline}
        for name, of_baseline in settings.items()
    }
    right, seen, regions = Counter[str](), 0, 0
    for until, kept in ROUNDS:
        images = dataset.images[seen : max(seen + 1, round(until * len(dataset.images)))]
        seen += len(images)
        regions += sum(len(proposals.boxes[image.id]) for image in images)
        part = replace(dataset, images=images)
        together = {
            description: method
            for of_baseline in left.values()
            for description, method in of_baseline.items()
        }
        scores = scored_batches(
            pipeline, model, part, vocabulary, proposals, together, batch_size, progress=progress
        )
        right += _num_right(scores, dataset, proposals)
        # of equals the first
        order = {name: sorted(found, key=lambda one: -right[one]) for name, found in left.items()}
        if seen == len(dataset.images):
            break
        for name, ranked in order.items():
            left[name] = {
                one: left[name][one] for one in ranked[: max(2, round(kept * len(ranked)))]
            }
    best = {}
    for name, (first, second, *_) in order.items():
        tuned_on = {
            "data": dataset.path.name,
            "images": seen,
            "regions": regions,
            "settings": len(settings[name]),
            "top1": round(100 * right[first] / regions, 1),
            "second": {second: round(100 * right[second] / regions, 1)},
        }
        best[name] = replace(left[name][first], tuned_on=tuned_on)
    return best


def _num_right(
    scores: Iterable[tuple[RegionBatch, str, FloatArray]],
    dataset: CocoDataset,
    proposals: Proposals,
) -> Counter[str]:
    """Method -> how many of the ground-truth regions it names right."""
    assert proposals.annotations is not None
    right = Counter[str]()
    for batch, description, probabilities in scores:
        for image, of_image in zip(batch.images, probabilities, strict=True):
            annotations = proposals.annotations[image.record.id]
            right[description] += int(
                is_right(dataset, annotations, of_image[: len(annotations)]).sum()
            )
    return right
