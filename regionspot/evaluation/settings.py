"""Baselines at their best: each one's setting is chosen on pictures that the comparison does not use."""

from __future__ import annotations

from dataclasses import replace

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.average_precision import Rules
from regionspot.evaluation.evaluator import evaluate_methods
from regionspot.evaluation.methods import HEAD, METHODS, Method, candidates, together
from regionspot.evaluation.proposals import ground_truth_proposals
from regionspot.modeling.regionspot import RegionSpot
from regionspot.structures import Vocabulary

NUM_IMAGES = 200


def methods_at_their_best(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    num_images: int = NUM_IMAGES,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Method]:
    """METHODS with each baseline at the setting whose top-1 accuracy on `dataset`'s annotated boxes is highest.

    Args:
        dataset: training pictures: what is measured afterwards must not be among them.
        vocabulary: `dataset.class_names`, with their embeddings.
        num_images: so many of its pictures, the first that have objects.

    Raises:
        InputError: no annotated box among them, or whatever `evaluate_methods` refuses.
    """
    images = tuple(image for image in dataset.images if dataset.annotations_by_image[image.id])[:num_images]
    if not images:
        raise InputError(f"{dataset.path} has no annotated box: no setting can be chosen on it")
    annotations = {image.id: dataset.annotations_by_image[image.id] for image in images}
    part = replace(dataset, images=images, annotations_by_image=annotations)
    rules: Rules = "coco" if any(image.neg_category_ids is None for image in images) else "lvis"
    choices = candidates(model)
    every = {description: method for of_method in choices.values() for description, method in of_method.items()}
    results = evaluate_methods(
        model,
        part,
        vocabulary,
        ground_truth_proposals(part, crowds=rules == "lvis"),
        every,
        rules,
        batch_size=batch_size,
        progress=progress,
    )
    best = {
        name: max(of_method.values(), key=lambda method: results[method.description][0]["top1"] or 0.0)
        for name, of_method in choices.items()
    }
    return METHODS | best | {"head_and_crops": together(HEAD, best["clip_crops"])}
