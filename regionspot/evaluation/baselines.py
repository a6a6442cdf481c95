"""What CLIP does with a region by itself, without RegionSpot's head: crops of the picture, and pooled patch tokens.

Each baseline has settings, and a comparison is fair at the best of them: `regionspot.evaluation.settings` finds it on
pictures that the comparison does not use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from regionspot.data.extraction import stack_images
from regionspot.evaluation.batches import LoadedImage, RegionBatch
from regionspot.masks import decode_rle
from regionspot.modeling.clip import IMAGE_MEAN, ClipBackbone
from regionspot.modeling.regionspot import RegionSpot
from regionspot.transforms import ClipTransform, UInt8Array, crop_boxes

CROP_BATCH = 256

RegionEmbedder = Callable[[RegionSpot, RegionBatch], Tensor]
"""Region embeddings (B, N, E) in CLIP's space."""


Shape = Literal["squeezed", "square"]
Background = Literal["kept", "masked"]
Over = Literal["boxes", "masks"]


@dataclass(frozen=True)
class CropSetting:
    """How a region is cut out for CLIP.

    Attributes:
        scale: the crop's sides in those of the box, about the same centre; above 1 for context.
        shape: "squeezed" takes the box as it is; "square" extends its shorter side, which keeps the aspect ratio. Both
            are clipped to the picture and resized to a square.
        size: the side in pixels of that square; None stands for CLIP's own. At another one, a multiple of CLIP's patch,
            its position embedding is interpolated.
        background: "kept", or "masked": what SAM's mask of the box leaves out is painted in CLIP's mean colour.
    """

    scale: float = 1.3
    shape: Shape = "squeezed"
    size: int | None = None
    background: Background = "kept"

    def __str__(self) -> str:
        size = "" if self.size is None else f", {self.size} px"
        return f"×{self.scale:g}, {self.shape}{size}, background {self.background}"


@dataclass(frozen=True)
class PoolingSetting:
    """Which of CLIP's local features are averaged over a region.

    Attributes:
        over: "boxes": the patches whose centre a box holds. "masks": all patches, weighted by SAM's mask of the box.
        features: "tokens": those of the feature map that the head reads. "values": as MaskCLIP (arXiv 2112.01071)
            makes them, in whose last layer each patch attends to itself alone.
    """

    over: Over = "boxes"
    features: Literal["tokens", "values"] = "tokens"

    def __str__(self) -> str:
        what = {"tokens": "patch tokens", "values": "patch values of the last layer"}[self.features]
        return f"{what}, mean over {self.over}"


def crop_settings(clip_size: int, patch: int) -> list[CropSetting]:
    """The settings that are worth trying for a CLIP of that input size: scale x shape x size x background."""
    smaller = patch * max(1, round(clip_size * 0.6 / patch))
    shapes: tuple[Shape, ...] = "squeezed", "square"
    backgrounds: tuple[Background, ...] = "kept", "masked"
    grid = itertools.product((1.0, 1.2, 1.5, 2.0), shapes, (None, smaller), backgrounds)
    return [CropSetting(*setting) for setting in grid]


def pooling_settings(over: Over) -> list[PoolingSetting]:
    return [PoolingSetting(over, "tokens"), PoolingSetting(over, "values")]


def crop_embedder(model: RegionSpot | None, setting: CropSetting) -> RegionEmbedder:
    """CLIP's image embedding of each region's crop."""
    clip: ClipBackbone | None = None if model is None or setting.size is None else model.clip.at_size(setting.size)

    def embed(model: RegionSpot, batch: RegionBatch) -> Tensor:
        encoder = clip or model.clip
        transform = ClipTransform(encoder.image_size)
        crops = (transform.apply_image(crop) for crop in _crops(batch, setting))
        parts = []
        while chunk := list(itertools.islice(crops, CROP_BATCH)):
            parts.append(encoder.pool(encoder.encode_image(stack_images(chunk).to(model.device))))
        embeddings = torch.cat(parts)  # (all regions, E)
        padded = embeddings.new_zeros(*batch.valid.shape, embeddings.shape[-1])
        padded[torch.from_numpy(batch.valid)] = embeddings
        return padded  # (B, N, E)

    return embed


def _crops(batch: RegionBatch, setting: CropSetting) -> Iterator[UInt8Array]:
    for index, image in enumerate(batch.images):
        boxes = _squared(image.boxes) if setting.shape == "square" else image.boxes
        if setting.background == "kept":
            yield from crop_boxes(image.picture, boxes, setting.scale)
            continue
        colour = np.round(np.array(IMAGE_MEAN) * 255).astype(np.uint8)
        for box, mask in zip(boxes, _masks(batch, index), strict=True):
            picture = np.where(mask[..., None], image.picture, colour) if mask.any() else image.picture
            yield from crop_boxes(picture, box[None], setting.scale)


def _squared(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True) / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def _masks(batch: RegionBatch, index: int) -> Iterator[npt.NDArray[np.bool_]]:
    assert batch.masks is not None
    return (decode_rle(rle) for rle in batch.masks[index])


def pooling_embedder(setting: PoolingSetting) -> RegionEmbedder:
    """The mean of CLIP's local features within each region, through CLIP's own last norm and projection."""

    def embed(model: RegionSpot, batch: RegionBatch) -> Tensor:
        assert batch.patch_tokens is not None
        tokens = torch.from_numpy(batch.patch_tokens[:, 1:]).to(model.device)  # (B, L - 1, D)
        if setting.features == "values":
            tokens = model.clip.encode_patches_alone(
                stack_images([image.clip_image for image in batch.images]).to(model.device)
            ).float()
        grid = math.isqrt(tokens.shape[1])
        weights = np.zeros((*batch.valid.shape, grid * grid), np.float32)  # (B, N, L - 1)
        for index, image in enumerate(batch.images):
            weights[index, : len(image.boxes)] = _weights(batch, index, image, grid, setting)
        pooled = (torch.from_numpy(weights).to(model.device) @ tokens).flatten(0, 1)  # (B * N, D)
        as_sequence = pooled.unsqueeze(1).expand(-1, 2, -1)  # twice: as the class token, and as the mean of the patches
        return model.clip.pool(as_sequence).unflatten(0, batch.valid.shape)  # (B, N, E)

    return embed


def _weights(
    batch: RegionBatch, index: int, image: LoadedImage, grid: int, setting: PoolingSetting
) -> npt.NDArray[np.float32]:
    height, width = image.picture.shape[:2]
    weights = cell_weights(image.boxes, height, width, grid)
    if setting.over == "masks":
        for row, mask in zip(weights, _masks(batch, index), strict=True):
            if mask.any():
                row[:] = mask_weights(mask, grid)
    return weights


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


def mask_weights(mask: npt.NDArray[np.bool_], grid: int) -> npt.NDArray[np.float32]:
    """A mask (H, W) that is not empty to (grid * grid,) weights that sum to 1: how much of each cell it covers."""
    covered = Image.fromarray(mask.astype(np.float32)).resize((grid, grid), Image.Resampling.BOX)
    weights = np.asarray(covered, np.float64).ravel()
    return (weights / weights.sum()).astype(np.float32)
