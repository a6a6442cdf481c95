"""Baselines at their best: each one's setting is chosen on pictures that the comparison does not use."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.evaluator import scored_batches
from regionspot.evaluation.methods import HEAD, METHODS, Method, candidates, ensemble
from regionspot.evaluation.proposals import Proposals, ground_truth_proposals
from regionspot.evaluation.top1 import is_right
from regionspot.evaluation.unreadable import readable_part
from regionspot.modeling.regionspot import RegionSpot
from regionspot.structures import Vocabulary

NUM_IMAGES = 200
TUNABLE = ("clip_crops", "roi_pooling", "mask_pooling", "head_and_crops")
ROUNDS = ((0.1, 0.25), (0.4, 0.25), (1.0, 0.0))
"""Successive halving: the part of the pictures that each round has seen at its end, and of settings that it keeps."""


def tuned_methods(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    methods: Collection[str] = tuple(METHODS),
    num_images: int = NUM_IMAGES,
    batch_size: int = 8,
    progress: bool = True,
    skip_unreadable: int = 0,
) -> dict[str, Method]:
    """The named methods, each baseline at the setting whose top-1 accuracy on annotated boxes is highest.

    The settings are found by successive halving: all of them on a tenth of the pictures, the better quarter on more,
    the better of these on all. Crops in "head_and_crops" are those that are best alone.

    Args:
        dataset: training pictures: what is measured afterwards must not be among them.
        vocabulary: `dataset.class_names`, with their embeddings.
        methods: keys of `METHODS`.
        num_images: so many of its pictures, the first that have objects.
        skip_unreadable: leave out so many of these at most that cannot be read.

    Raises:
        InputError: no annotated box among them, or more pictures that cannot be read.
    """
    proposals = ground_truth_proposals(dataset)
    images = [image for image in dataset.images if len(proposals.boxes[image.id])][:num_images]
    part = readable_part(replace(dataset, images=tuple(images)), proposals, skip_unreadable, progress).dataset
    if not part.images:
        raise InputError(
            f"{dataset.path} has no annotated box in a picture that can be read: no setting can be chosen on it"
        )
    names = [name for name in candidates(model.clip) if name in methods]
    if "head_and_crops" in methods and "clip_crops" not in names:
        names.append("clip_crops")
    best = {
        name: _best(model, part, vocabulary, proposals, candidates(model.clip)[name], batch_size, progress)
        for name in names
    }
    if "head_and_crops" in methods:
        both = ensemble(HEAD, best["clip_crops"])
        best["head_and_crops"] = replace(both, tuned_on=best["clip_crops"].tuned_on)
    return {name: best.get(name, METHODS[name]) for name in methods}


def _best(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    settings: Sequence[Method],
    batch_size: int,
    progress: bool,
) -> Method:
    """Of one baseline's settings. Raises InputError."""
    left = {method.description: method for method in settings}
    right, seen, regions = dict.fromkeys(left, 0), 0, 0
    for until, kept in ROUNDS:
        images = dataset.images[seen : max(seen + 1, round(until * len(dataset.images)))]
        seen += len(images)
        part = replace(dataset, images=images)
        assert proposals.annotations is not None
        for batch, name, probabilities in scored_batches(
            model, part, vocabulary, proposals, left, batch_size, progress=progress
        ):
            for image, of_image in zip(batch.images, probabilities, strict=True):
                annotations = proposals.annotations[image.record.id]
                right[name] += int(is_right(dataset, annotations, of_image[: len(annotations)]).sum())
        regions += sum(len(proposals.boxes[image.id]) for image in images)
        order = sorted(left, key=lambda name: -right[name])  # of equals the first
        if seen == len(dataset.images):
            break
        left = {name: left[name] for name in order[: max(2, round(kept * len(order)))]}
    best = left[order[0]]
    tuned_on = {
        "data": dataset.path.name,
        "images": seen,
        "regions": regions,
        "settings": len(settings),
        "top1": round(100 * right[order[0]] / regions, 1),
        "second": {order[1]: round(100 * right[order[1]] / regions, 1)},
    }
    return replace(best, tuned_on=tuned_on)
