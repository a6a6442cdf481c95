"""The ways to score a region that are measured side by side: RegionSpot's head, two baselines, one control.

Each is a function of a batch of encoded images and of the words' embeddings that gives logits (B, N, V). The head and
its control go through a `RegionPipeline`, in any runtime; the baselines use CLIP's own modules, so they need PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regionspot.data.extraction import stack_images
from regionspot.errors import InputError
from regionspot.evaluation.batches import RegionBatch
from regionspot.modeling.losses import region_logits
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.runtime.scores import best_reading
from regionspot.structures import FloatArray
from regionspot.transforms import ClipTransform, crop_boxes

CROP_SCALE = 1.3
CROP_BATCH = 256

RegionScorer = Callable[[RegionBatch, FloatArray], FloatArray]
"""Logits (B, N, V) of a batch's regions over words with embeddings (V, E); rows of padding mean nothing."""

Start = Callable[[RegionPipeline, RegionSpot | None], RegionScorer]
"""Takes the model as a pipeline, and as itself where it is there."""

RegionEmbedder = Callable[[RegionSpot, RegionBatch], Tensor]
"""Region embeddings (B, N, E) in CLIP's space."""


@dataclass(frozen=True)
class Method:
    """One way to score regions: what it is in words, what it needs, and how to start one run of it."""

    description: str
    start: Start = field(repr=False)
    needs_mask_tokens: bool = False
    needs_patch_tokens: bool = False
    needs_torch: bool = False


def score_with_head(pipeline: RegionPipeline, _: RegionSpot | None) -> RegionScorer:
    """RegionSpot itself: all regions of an image at once, padding masked out.

    For a head that was trained on SAM's multimask tokens each reading of all regions is a set of its own, as in
    prediction, and of each region the reading with the highest predicted IoU counts.
    """

    def score(batch: RegionBatch, text_embeddings: FloatArray) -> FloatArray:
        assert batch.mask_tokens is not None and batch.patch_tokens is not None and batch.iou_predictions is not None
        logits = pipeline.classify_readings(batch.mask_tokens, batch.patch_tokens, batch.valid, text_embeddings)
        return best_reading(logits, batch.iou_predictions)

    return score


def scored_by(embed: RegionEmbedder) -> Start:
    """Cosines of what a baseline embeds, at CLIP's own scale."""

    def start(_: RegionPipeline, model: RegionSpot | None) -> RegionScorer:
        if model is None:
            raise InputError("this baseline runs CLIP's own modules: give it the model, not a pipeline of it")

        def score(batch: RegionBatch, text_embeddings: FloatArray) -> FloatArray:
            with model.inference():
                words = torch.from_numpy(text_embeddings).to(model.device)  # (V, E)
                embeddings = embed(model, batch).float()  # of a half-precision model: words are in float32
                found: FloatArray = region_logits(embeddings, words, model.clip.logit_scale).float().cpu().numpy()
            return found

        return score

    return start


def embed_clip_crops(model: RegionSpot, batch: RegionBatch) -> Tensor:
    """CLIP's image embedding of each box, cut out 1.3 times as large and squeezed to CLIP's square."""
    transform = ClipTransform(model.clip.image_size)
    crops = (
        transform.apply_image(crop)
        for image in batch.images
        for crop in crop_boxes(image.picture, image.boxes, CROP_SCALE)
    )
    parts = []
    while chunk := list(islice(crops, CROP_BATCH)):
        parts.append(model.clip.pool(model.clip.encode_image(stack_images(chunk).to(model.device))))
    embeddings = torch.cat(parts)  # (all regions, E)
    padded = embeddings.new_zeros(*batch.valid.shape, embeddings.shape[-1])
    padded[torch.from_numpy(batch.valid)] = embeddings
    return padded  # (B, N, E)


def embed_roi_pooled(model: RegionSpot, batch: RegionBatch) -> Tensor:
    """The mean of CLIP's patch tokens within each box, through CLIP's own last norm and projection."""
    assert batch.patch_tokens is not None
    grid = math.isqrt(batch.patch_tokens.shape[1] - 1)
    weights = np.zeros((*batch.valid.shape, grid * grid), np.float32)  # (B, N, L - 1)
    for row, image in zip(weights, batch.images, strict=True):
        height, width = image.picture.shape[:2]
        row[: len(image.boxes)] = cell_weights(image.boxes, height, width, grid)
    pooled = torch.from_numpy(weights @ batch.patch_tokens[:, 1:]).to(model.device).flatten(0, 1)  # (B * N, D)
    as_sequence = pooled.unsqueeze(1).expand(-1, 2, -1)  # twice: as the class token, and as the mean of the patches
    return model.clip.pool(as_sequence).unflatten(0, batch.valid.shape)  # (B, N, E)


def cell_weights(boxes: npt.NDArray[np.float64], height: int, width: int, grid: int) -> npt.NDArray[np.float32]:
    """(N, 4) boxes to (N, grid * grid) weights that sum to 1: the cells, row by row, whose centre a box holds.

    In an axis in which a box holds no centre, it takes the one nearest to its own.
    """
    centres = (np.arange(grid) + 0.5) / grid
    low, high = boxes[:, :2] / [width, height], boxes[:, 2:] / [width, height]  # (N, 2) xy in 0..1
    within = (low[:, None] <= centres[:, None]) & (centres[:, None] <= high[:, None])  # (N, grid, 2)
    nearest = np.abs(centres[:, None] - ((low + high) / 2)[:, None]).argmin(1)  # (N, 2)
    within |= ~within.any(1, keepdims=True) & (np.arange(grid)[:, None] == nearest[:, None])
    cells = (within[:, :, None, 1] & within[:, None, :, 0]).reshape(len(boxes), grid * grid)
    return (cells / cells.sum(1, keepdims=True)).astype(np.float32)


class ConstantToken:
    """The control: the head with one token for every region, so that nothing says which region is meant.

    The token is the mean over the first batch, and stays that for the whole run. Of several readings of a region the
    one with the highest predicted IoU counts.
    """

    def __init__(self, pipeline: RegionPipeline, _: RegionSpot | None = None) -> None:
        self._pipeline = pipeline
        self._token: FloatArray | None = None

    def __call__(self, batch: RegionBatch, text_embeddings: FloatArray) -> FloatArray:
        assert batch.mask_tokens is not None and batch.patch_tokens is not None and batch.iou_predictions is not None
        if self._token is None:
            self._token = best_reading(batch.mask_tokens, batch.iou_predictions)[batch.valid].mean(0)  # (C,)
        same = np.tile(self._token, (*batch.valid.shape, 1))  # (B, N, C)
        return self._pipeline.classify(same, batch.patch_tokens, batch.valid, text_embeddings)


METHODS: dict[str, Method] = {
    "head": Method("RegionSpot's head", score_with_head, needs_mask_tokens=True, needs_patch_tokens=True),
    "clip_crops": Method(f"CLIP on box crops ×{CROP_SCALE}", scored_by(embed_clip_crops), needs_torch=True),
    "roi_pooling": Method(
        "CLIP's patch tokens, RoI-pooled", scored_by(embed_roi_pooled), needs_patch_tokens=True, needs_torch=True
    ),
    "constant_token": Method(
        "the head with one constant mask token", ConstantToken, needs_mask_tokens=True, needs_patch_tokens=True
    ),
}


def check_methods(names: Sequence[str], runtime: str = "torch") -> None:
    """Raises InputError for a method that is not in METHODS, or not in this runtime, or none at all."""
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise InputError(f"unknown methods {unknown}: choose from {', '.join(METHODS)}")
    wanting = [name for name in names if METHODS[name].needs_torch]
    if wanting and runtime != "torch":
        anywhere = ", ".join(name for name, method in METHODS.items() if not method.needs_torch)
        raise InputError(
            f"{' and '.join(wanting)} run CLIP's own modules in PyTorch, not exported graphs in {runtime}: leave out "
            f"--runtime and --artifacts, or choose from {anywhere}"
        )
