"""The ways to embed a region that are measured side by side: RegionSpot's head, two baselines, one control.

Each is a function of the model and a batch of encoded images that gives region embeddings (B, N, E) in CLIP's space;
what follows, cosines with the text embeddings and a softmax, is the same for all.
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
from regionspot.modeling.regionspot import RegionSpot
from regionspot.transforms import ClipTransform, crop_boxes

CROP_SCALE = 1.3
CROP_BATCH = 256

RegionEmbedder = Callable[[RegionSpot, RegionBatch], Tensor]


@dataclass(frozen=True)
class Method:
    """One way to embed regions: what it is in words, what it needs of the encoders, and how to start one run of it."""

    description: str
    start: Callable[[], RegionEmbedder] = field(repr=False)
    needs_mask_tokens: bool = False
    needs_patch_tokens: bool = False


def embed_with_head(model: RegionSpot, batch: RegionBatch) -> Tensor:
    """RegionSpot itself: all regions of an image at once, padding masked out."""
    assert batch.mask_tokens is not None and batch.patch_tokens is not None
    embeddings: Tensor = model.head(batch.mask_tokens, batch.patch_tokens, batch.valid)  # (B, N, E)
    return embeddings


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
    padded[batch.valid] = embeddings
    return padded  # (B, N, E)


def embed_roi_pooled(model: RegionSpot, batch: RegionBatch) -> Tensor:
    """The mean of CLIP's patch tokens within each box, through CLIP's own last norm and projection."""
    assert batch.patch_tokens is not None
    grid = math.isqrt(batch.patch_tokens.shape[1] - 1)
    weights = batch.patch_tokens.new_zeros(*batch.valid.shape, grid * grid)  # (B, N, L - 1)
    for row, image in zip(weights, batch.images, strict=True):
        height, width = image.picture.shape[:2]
        row[: len(image.boxes)] = torch.from_numpy(cell_weights(image.boxes, height, width, grid))
    pooled = (weights @ batch.patch_tokens[:, 1:]).flatten(0, 1)  # (B * N, D)
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

    The token is the mean over the first batch, and stays that for the whole run.
    """

    def __init__(self) -> None:
        self._token: Tensor | None = None

    def __call__(self, model: RegionSpot, batch: RegionBatch) -> Tensor:
        assert batch.mask_tokens is not None and batch.patch_tokens is not None
        if self._token is None:
            self._token = batch.mask_tokens[batch.valid].mean(0)  # (C,)
        same = self._token.expand_as(batch.mask_tokens)
        embeddings: Tensor = model.head(same, batch.patch_tokens, batch.valid)  # (B, N, E)
        return embeddings


METHODS: dict[str, Method] = {
    "head": Method("RegionSpot's head", lambda: embed_with_head, needs_mask_tokens=True, needs_patch_tokens=True),
    "clip_crops": Method(f"CLIP on box crops ×{CROP_SCALE}", lambda: embed_clip_crops),
    "roi_pooling": Method("CLIP's patch tokens, RoI-pooled", lambda: embed_roi_pooled, needs_patch_tokens=True),
    "constant_token": Method(
        "the head with one constant mask token", ConstantToken, needs_mask_tokens=True, needs_patch_tokens=True
    ),
}


def check_methods(names: Sequence[str]) -> None:
    """Raises InputError for a method that is not in METHODS, or none at all."""
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise InputError(f"unknown methods {unknown}: choose from {', '.join(METHODS)}")
