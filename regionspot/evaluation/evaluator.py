"""Run a model over a data set: encode each image once, embed its regions by every method asked for,
measure AP.

Images are taken in the order of their region counts, most first, so that a batch holds little
padding and a batch too large for the memory fails at the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.data.coco_json import CocoDataset, ImageRecord
from regionspot.data.json_reading import Id, id_array, printable, shown
from regionspot.errors import InputError, first_few
from regionspot.evaluation.average_precision import (
    LVIS_MAX_DETECTIONS,
    MAX_DETECTIONS,
    Rules,
    check_ground_truth,
    evaluate_detections,
)
from regionspot.evaluation.batches import (
    BatchEncoder,
    LoadedImage,
    RegionBatch,
    load_image,
    prefetched,
)
from regionspot.evaluation.detections import Detections
from regionspot.evaluation.methods import METHODS, Method, check_runs_in, methods_named
from regionspot.evaluation.proposals import Proposals
from regionspot.evaluation.segmentations import odd_masks
from regionspot.evaluation.selection import PAIRS_PER_IMAGE, best_labels, top_pairs
from regionspot.evaluation.top1 import is_right, top1_accuracy
from regionspot.evaluation.unreadable import ReadablePart, readable_part
from regionspot.masks import Rle
from regionspot.modeling.regionspot import RegionSpot
from regionspot.predictor import as_pipeline
from regionspot.progress import Progress
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.runtime.scores import softmax
from regionspot.structures import FloatArray, Vocabulary

Metrics = dict[str, Any]


@dataclass(frozen=True)
class MeasuredModel:
    """What a protocol says of the model.

    Args:
        mask_token: which of SAM's mask tokens stands for a region.
    """

    name: str
    runtime: str
    precision: str
    mask_token: str

    @classmethod
    def of(cls, pipeline: RegionPipeline) -> MeasuredModel:
        token = MULTIMASK_TOKEN if pipeline.info.multimask else SINGLE_TOKEN
        return cls(pipeline.name, pipeline.runtime, pipeline.precision, token)


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """What a method found in one image with n regions.

    Args:
        boxes: (n, 4) xyxy in original-image pixels.
        probabilities: (n, V) of the words.
        masks: n masks at the image's size, or None.
    """

    record: ImageRecord
    boxes: npt.NDArray[np.float64]
    probabilities: FloatArray
    masks: Sequence[Rle] | None = None


SINGLE_TOKEN = "SAM's single-mask token"
MULTIMASK_TOKEN = "of SAM's three multimask tokens the one with the highest predicted IoU"


def evaluate(
    model: RegionSpot | RegionPipeline,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    method: str | Method = "head",
    rules: Rules = "lvis",
    masks: bool = False,
    batch_size: int = 8,
    progress: bool = True,
    skip_unreadable: int = 0,
) -> tuple[Metrics, Detections]:
    """Measures one method; see `evaluate_methods`."""
    named = methods_named([method]) if isinstance(method, str) else {method.description: method}
    results = evaluate_methods(
        model,
        dataset,
        vocabulary,
        proposals,
        named,
        rules,
        masks,
        batch_size,
        progress,
        skip_unreadable,
    )
    return next(iter(results.values()))


def evaluate_methods(
    model: RegionSpot | RegionPipeline,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    methods: Sequence[str] | Mapping[str, Method] = ("head",),
    rules: Rules = "lvis",
    masks: bool = False,
    batch_size: int = 8,
    progress: bool = True,
    skip_unreadable: int = 0,
    groups: Mapping[str, Collection[Id]] | None = None,
) -> dict[str, tuple[Metrics, Detections]]:
    """Measures several methods on the same regions, every image encoded once.

    Every picture is read once before the first is encoded, so that a bad one does not cost finished
    work. Categories that share a name are told apart by their ids alone: each gets the probability
    of their one word.

    Args:
        model: on any device, the work is done there; or a pipeline of exported graphs, for the
            methods that need no PyTorch.
        dataset: images and ground truth.
        vocabulary: `dataset.class_names`, in that order, with their embeddings.
        proposals: the regions.
        methods: keys of `METHODS`; or any methods by any name.
        rules: LVIS's or COCO's.
        masks: also predict each region's mask by SAM and measure mask AP.
        batch_size: images at a time.
        progress: show on stderr how far it is.
        skip_unreadable: leave out this many pictures at most, with their objects, that are missing,
            damaged, or not of the size that the annotations are for. They are listed in the
            protocol.
        groups: name -> ids of categories: further groups of `top1_accuracy`.

    Returns:
        For each method its metrics and its detections in the data set's order of images. Metrics
        are the figures of `evaluate_detections` for boxes, where one region may carry several
        labels; `one_label`, the same figures where each region carries its best label alone; for
        ground-truth boxes those of `top1_accuracy`; `protocol`, all that must stand beside them;
        and, with masks, `segm`, the first figures for masks.

    Raises:
        InputError: before anything is computed: an unknown method, or one that this runtime has
            not, a vocabulary other than the data set's classes, nothing to evaluate, annotations
            that the rules cannot judge (see `check_ground_truth`), more regions in an image than a
            graph takes, more pictures that cannot be used than `skip_unreadable`. Later: a model
            that gives NaN.
    """
    pipeline = as_pipeline(model)
    check_can_evaluate(dataset, rules, masks)
    chosen = dict(methods) if isinstance(methods, Mapping) else methods_named(methods)
    check_runs_in(chosen, pipeline.runtime)
    _check(dataset, vocabulary, proposals, batch_size)
    pipeline.check_num_regions(max(map(len, proposals.boxes.values()), default=0))
    part = readable_part(dataset, proposals, skip_unreadable, progress)
    if part.skipped:
        check_can_evaluate(part.dataset, rules, masks)
    collector = _Collector(
        part.dataset,
        part.proposals,
        rules,
        masks,
        groups or {},
        {name: _Found() for name in chosen},
    )
    module = model if isinstance(model, RegionSpot) else None
    for batch, name, probabilities in scored_batches(
        pipeline,
        module,
        part.dataset,
        vocabulary,
        part.proposals,
        chosen,
        batch_size,
        masks,
        progress,
    ):
        for image in _scored_images(batch, probabilities):
            collector.add(name, image)
    described = MeasuredModel.of(pipeline)
    return {
        name: _measure(described, collector, name, method, part.skipped)
        for name, method in chosen.items()
    }


def evaluate_scores(
    model: MeasuredModel,
    part: ReadablePart,
    scored: Iterable[ScoredImage],
    rules: Rules = "lvis",
    masks: bool = False,
) -> tuple[Metrics, Detections]:
    """Measures the head where something else runs it, such as a server behind a gateway.

    Args:
        part: images, ground truth and regions, from `readable_part`.
        scored: every image of it that has regions, in any order; the words are the data set's
            `class_names`.
        rules: LVIS's or COCO's.
        masks: also measure mask AP, by the masks of `scored`.

    Returns:
        Metrics and detections, as of `evaluate_methods`.

    Raises:
        InputError: annotations that the rules cannot judge, scores that are NaN.
    """
    check_can_evaluate(part.dataset, rules, masks)
    name = "head"
    found = {name: _Found()}
    collector = _Collector(part.dataset, part.proposals, rules, masks, {}, found)
    for image in scored:
        collector.add(name, image)
    return _measure(model, collector, name, METHODS[name], part.skipped)


def _scored_images(batch: RegionBatch, probabilities: FloatArray) -> Iterator[ScoredImage]:
    """The images of a batch; probabilities are (B, N, V), with rows of padding."""
    for index, image in enumerate(batch.images):
        masks = None if batch.masks is None else batch.masks[index]
        own = probabilities[index, : len(image.boxes)]  # (n, V)
        yield ScoredImage(image.record, image.boxes, own, masks)


def scored_batches(
    pipeline: RegionPipeline,
    model: RegionSpot | None,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    methods: Mapping[str, Method],
    batch_size: int,
    masks: bool = False,
    progress: bool = True,
) -> Iterator[tuple[RegionBatch, str, FloatArray]]:
    """Encodes each image that has regions once, and yields for each batch and method the
    probabilities (B, N, V).

    Args:
        model: what the pipeline is of, for the methods that need PyTorch.
    """
    encoder = BatchEncoder(
        pipeline,
        mask_tokens=any(method.needs_mask_tokens for method in methods.values()),
        patch_tokens=any(method.needs_patch_tokens for method in methods.values()),
        masks=masks or any(method.needs_masks for method in methods.values()),
    )
    scorers = {name: method.start(pipeline, model) for name, method in methods.items()}
    for images in _loaded_batches(pipeline, dataset, proposals, batch_size, progress):
        batch = encoder.encode(images)
        for name, score in scorers.items():
            yield batch, name, softmax(score(batch, vocabulary.embeddings))


def check_can_evaluate(dataset: CocoDataset, rules: Rules, masks: bool) -> None:
    """Checks what can be checked of the ground truth alone.

    Raises:
        InputError: nothing to evaluate against, or annotations that the rules cannot judge (see
            `check_ground_truth`).
    """
    if not dataset.categories:
        raise InputError(f"{dataset.path} has no categories, so there are no words to choose from")
    objects = [a for of_image in dataset.annotations_by_image.values() for a in of_image]
    if not dataset.images or not objects:
        raise InputError(
            f"{dataset.path} has {len(dataset.images)} images and {len(objects)} annotations: "
            "nothing to evaluate against"
        )
    if rules == "coco" and all(annotation.iscrowd for annotation in objects):
        raise InputError(
            f"{dataset.path}: all {len(objects)} annotations are crowds (iscrowd), which are "
            "neither found nor missed: nothing to evaluate against"
        )
    check_ground_truth(dataset, rules, "segm" if masks else "bbox")


def _loaded_batches(
    pipeline: RegionPipeline,
    dataset: CocoDataset,
    proposals: Proposals,
    batch_size: int,
    progress: bool,
) -> Iterator[list[LoadedImage]]:
    """All images that have regions, those with most first."""
    sizes = pipeline.info.sam_image_size, pipeline.info.clip_image_size

    def load(record: ImageRecord) -> LoadedImage:
        return load_image(dataset, record, proposals.boxes[record.id], *sizes)

    with_regions = [record for record in dataset.images if len(proposals.boxes[record.id])]
    records = sorted(with_regions, key=lambda record: -len(proposals.boxes[record.id]))
    batches = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
    with Progress("evaluate", len(records), "images") if progress else _silence() as bar:
        done = 0
        for images in prefetched(batches, load):
            yield images
            done += len(images)
            if bar:
                bar.update(done)


def _silence() -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


@dataclass(frozen=True, eq=False)
class _Found:
    """What one method found, by image id.

    Attributes:
        detections: the best pairs, one region in several of them.
        best_labels: of each region its best word alone, without masks: all categories of that name.
        right: (n,) whether that is the annotated one; empty where the regions are not the annotated
            boxes.
    """

    detections: dict[Id, Detections] = field(default_factory=dict, repr=False)
    best_labels: dict[Id, Detections] = field(default_factory=dict, repr=False)
    right: dict[Id, npt.NDArray[np.bool_]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class _Collector:
    """Collects what each method finds, as the images come."""

    dataset: CocoDataset
    proposals: Proposals
    rules: Rules
    masks: bool
    groups: Mapping[str, Collection[Id]]
    found: dict[str, _Found]

    @cached_property
    def category_ids(self) -> npt.NDArray[Any]:
        """(V,) ids of the categories."""
        return id_array(category.id for category in self.dataset.categories)

    @cached_property
    def words(self) -> npt.NDArray[np.int64]:
        """(V,) index of each category's name in the vocabulary."""
        return np.array(
            [self.dataset.category_index[category.id] for category in self.dataset.categories],
            np.int64,
        )

    def add(self, method: str, image: ScoredImage) -> None:
        """Keeps the best pairs of an image."""
        found, of_image = self.found[method], image.probabilities
        if not np.isfinite(of_image).all():
            raise InputError(
                f"method {method!r} gives NaN for image {printable(image.record.file_name)}: "
                "are the weights damaged, or did half precision overflow?"
            )
        image_id, scores_of = image.record.id, self.proposals.scores
        masks = image.masks if self.masks else None
        scores = None if scores_of is None else scores_of[image_id]
        of_categories = of_image[:, self.words]  # (n, V)
        found.detections[image_id] = self._detections(
            image, *top_pairs(of_categories, scores), masks
        )
        best = best_labels(of_image, self.words, scores)
        found.best_labels[image_id] = self._detections(image, *best, None)
        if self.proposals.annotations is not None:
            found.right[image_id] = is_right(
                self.dataset, self.proposals.annotations[image_id], of_image
            )

    def _detections(
        self,
        image: ScoredImage,
        regions: npt.NDArray[np.int64],
        classes: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float64],
        masks: Any,
    ) -> Detections:
        if self.rules == "lvis":  # more would not be judged, so no more are held in memory
            kept = slice(LVIS_MAX_DETECTIONS)
            regions, classes, scores = regions[kept], classes[kept], scores[kept]
        return Detections(
            id_array([image.record.id] * len(scores)),
            self.category_ids[classes],
            image.boxes[regions],
            scores,
            None if masks is None else [masks[region] for region in regions.tolist()],
        )

    def in_order(self, by_image: dict[Id, Detections]) -> Detections:
        """All detections in the data set's order of images."""
        return Detections.concatenate(
            [by_image[i.id] for i in self.dataset.images if i.id in by_image]
        )


def _measure(
    model: MeasuredModel,
    collector: _Collector,
    name: str,
    method: Method,
    skipped: Sequence[str],
) -> tuple[Metrics, Detections]:
    dataset, rules, found = collector.dataset, collector.rules, collector.found[name]
    detections = collector.in_order(found.detections)
    metrics: Metrics = dict(evaluate_detections(dataset, detections, rules, "bbox"))
    metrics["one_label"] = evaluate_detections(
        dataset, collector.in_order(found.best_labels), rules, "bbox"
    )
    if collector.proposals.annotations is not None:
        metrics |= top1_accuracy(
            dataset, collector.proposals.annotations, found.right, collector.groups
        )
    if collector.masks:
        metrics["segm"] = evaluate_detections(dataset, detections, rules, "segm")
    metrics["protocol"] = _protocol(model, collector, method) | {"images_skipped": list(skipped)}
    return metrics, detections


def _protocol(model: MeasuredModel, collector: _Collector, method: Method) -> dict[str, Any]:
    dataset, proposals = collector.dataset, collector.proposals
    scores = f"softmax over {len(dataset.class_names)} classes"
    without_pixels, apart = odd_masks(dataset) if collector.masks else (0, 0)
    return {
        "model": model.name,
        "runtime": model.runtime,
        "precision": model.precision,
        "method": method.description,
        "tuned_on": None if method.tuned_on is None else dict(method.tuned_on),
        "mask_token": model.mask_token,
        "rules": collector.rules,
        "proposals": proposals.source,
        "boxes_dropped": proposals.num_dropped,
        "classes": len(dataset.class_names),
        "scores": scores if proposals.scores is None else f"{scores} × detector score",
        "shared_names": len(dataset.categories) - len(dataset.class_names),
        "pairs_per_image": PAIRS_PER_IMAGE,
        "detections_judged": MAX_DETECTIONS[collector.rules],
        "images": len(dataset.images),
        "regions": proposals.num_regions,
        "masks_without_pixels": without_pixels,
        "masks_beside_boxes": apart,
    }


def _check(
    dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals, batch_size: int
) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, not {batch_size}")
    names = dataset.class_names
    if vocabulary.names != names:
        pairs = zip(vocabulary.names, names, strict=False)
        position = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(vocabulary), len(names))
        )
        raise InputError(
            f"the vocabulary has {len(vocabulary)} names and {dataset.path} has {len(names)} class "
            f"names; they differ from index {position} on. Encode `dataset.class_names`, in that "
            "order."
        )
    missing = [image.id for image in dataset.images if image.id not in proposals.boxes]
    if missing:
        raise InputError(
            "the proposals are of another data set: no entry for the images "
            f"{first_few(map(shown, missing))}"
        )
