"""What CLIP does with a region by itself, without RegionSpot's head: crops of the picture, and
pooled patch tokens.

Each baseline has settings, and a comparison is fair at the best of them:
`regionspot.evaluation.tuning` finds it on pictures that the comparison does not use.
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
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from regionspot.data.extraction import stack_images
from regionspot.evaluation.batches import LoadedImage, RegionBatch
from regionspot.masks import decode_rle
from regionspot.modeling.clip import IMAGE_MEAN, ClipBackbone
from regionspot.modeling.regionspot import RegionSpot
from regionspot.structures import UInt8Array
from regionspot.transforms import ClipTransform, crop_boxes

CROP_BATCH = 256
MEAN_COLOUR = np.round(np.array(IMAGE_MEAN) * 255).astype(np.uint8)

RegionEmbedder = Callable[[RegionBatch], Tensor]
"""Region embeddings (B, N, E) in CLIP's space."""

Shape = Literal["squeezed", "square"]
Background = Literal["kept", "masked"]
Over = Literal["boxes", "masks"]
Features = Literal["tokens", "values"]
Order = Literal["pooled first", "projected first"]


@dataclass(frozen=True)
class CropSetting:
    """How a region is cut out for CLIP.

    Attributes:
        scale: the crop's sides in those of the box, about the same centre; above 1 for context.
        shape: "squeezed" takes the box as it is, clipped to the picture. "square" extends its
            shorter side, which keeps the aspect ratio; beyond the picture lies CLIP's mean colour.
        size: the side in pixels of the square that CLIP sees, a multiple of its patch; None stands
            for its own.
        background: "kept", or "masked": what SAM's mask of the box leaves out is painted in CLIP's
            mean colour.
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
        over: "boxes": the patches whose centre a box holds. "masks": all patches, weighted by SAM's
            mask of the box.
        features: "tokens": those of the feature map that the head reads. "values": as MaskCLIP
            (arXiv 2112.01071) makes them, in whose last layer each patch attends to itself alone.
        order: "pooled first", then CLIP's last norm and projection; or each patch "projected
            first".
    """

    over: Over = "boxes"
    features: Features = "tokens"
    order: Order = "pooled first"

    def __str__(self) -> str:
        what = {"tokens": "patch tokens", "values": "patch values of the last layer"}[self.features]
        return f"{what}, mean over {self.over}, {self.order}"


def crop_settings(clip_size: int, patch: int) -> list[CropSetting]:
    """Those that are worth trying for a CLIP of that input size: scale x shape x size x
    background.
    """
    smaller = sorted({patch * max(1, round(clip_size * part / patch)) for part in (0.5, 0.75)})
    sizes = [None, *(size for size in smaller if size < clip_size)]
    shapes: tuple[Shape, ...] = "squeezed", "square"
    backgrounds: tuple[Background, ...] = "kept", "masked"
    grid = itertools.product((1.0, 1.3, 1.6, 2.0, 2.5, 3.0), shapes, sizes, backgrounds)
    return [CropSetting(*setting) for setting in grid]


def pooling_settings(over: Over) -> list[PoolingSetting]:
    features: tuple[Features, ...] = "tokens", "values"
    orders: tuple[Order, ...] = "pooled first", "projected first"
    return [PoolingSetting(over, *setting) for setting in itertools.product(features, orders)]


def crop_embedder(model: RegionSpot, setting: CropSetting) -> RegionEmbedder:
    """CLIP's image embedding of each region's crop."""
    clip: ClipBackbone = model.clip if setting.size is None else model.clip.at_size(setting.size)
    transform = ClipTransform(clip.image_size)

    def embed(batch: RegionBatch) -> Tensor:
        crops = (transform.apply_image(crop) for crop in _crops(batch, setting))
        parts = []
        while chunk := list(itertools.islice(crops, CROP_BATCH)):
            parts.append(clip.pool(clip.encode_image(stack_images(chunk).to(model.device))))
        embeddings = torch.cat(parts)  # (all regions, E)
        padded = embeddings.new_zeros(*batch.valid.shape, embeddings.shape[-1])
        padded[torch.from_numpy(batch.valid)] = embeddings
        return padded  # (B, N, E)

    return embed


def _crops(batch: RegionBatch, setting: CropSetting) -> Iterator[UInt8Array]:
    for index, image in enumerate(batch.images):
        height, width = image.picture.shape[:2]
        boxes = np.clip(image.boxes, 0, np.array([width, height, width, height]))
        masks = _masks(batch, index) if setting.background == "masked" else itertools.repeat(None)
        for box, mask in zip(boxes, masks, strict=False):
            picture = image.picture
            if mask is not None and mask.any():
                picture = np.where(mask[..., None], picture, MEAN_COLOUR)
            cut = square_crop if setting.shape == "square" else _squeezed_crop
            yield cut(picture, box, setting.scale)


def _squeezed_crop(picture: UInt8Array, box: npt.NDArray[np.float64], scale: float) -> UInt8Array:
    return crop_boxes(picture, box[None], scale)[0]


def square_crop(picture: UInt8Array, box: npt.NDArray[np.float64], scale: float) -> UInt8Array:
    """A square about the centre of a box (4,), `scale` times its longer side; CLIP's mean colour
    beyond the picture.
    """
    side = max(1, round(scale * float((box[2:] - box[:2]).max())))
    x, y = np.round((box[:2] + box[2:] - side) / 2).astype(int).tolist()
    crop = np.tile(MEAN_COLOUR, (side, side, 1))
    rows = slice(max(0, y), max(0, min(picture.shape[0], y + side)))
    columns = slice(max(0, x), max(0, min(picture.shape[1], x + side)))
    inside = picture[rows, columns]
    crop[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = inside
    return crop


def _masks(batch: RegionBatch, index: int) -> Iterator[npt.NDArray[np.bool_]]:
    assert batch.masks is not None
    return (decode_rle(rle) for rle in batch.masks[index])


def pooling_embedder(model: RegionSpot, setting: PoolingSetting) -> RegionEmbedder:
    """The mean of CLIP's local features within each region, in CLIP's space."""
    clip = model.clip

    def embed(batch: RegionBatch) -> Tensor:
        patches = _patches(clip, batch, setting).to(model.device)  # (B, L - 1, D)
        grid = math.isqrt(patches.shape[1])
        weights = np.zeros((*batch.valid.shape, grid * grid), np.float32)  # (B, N, L - 1)
        for index, image in enumerate(batch.images):
            weights[index, : len(image.boxes)] = _weights(batch, index, image, grid, setting)
        means = torch.from_numpy(weights).to(model.device)
        if setting.order == "pooled first":
            return _project(clip, means @ patches)
        return means @ F.normalize(_project(clip, patches), dim=-1)

    return embed


def _patches(clip: ClipBackbone, batch: RegionBatch, setting: PoolingSetting) -> Tensor:
    if setting.features == "values":
        images = stack_images(
            [
                image.prepared.clip_image
                for image in batch.images
                if image.prepared.clip_image is not None
            ]
        )
        return clip.encode_patches_without_mixing(images.to(clip.image_mean.device)).float()
    assert batch.patch_tokens is not None
    return torch.from_numpy(batch.patch_tokens[:, 1:])


def _project(clip: ClipBackbone, tokens: Tensor) -> Tensor:
    """Tokens (B, n, D) through CLIP's own last norm and projection: (B, n, E)."""
    # twice: the class token, the mean of the patches
    as_sequences = tokens.flatten(0, 1).unsqueeze(1).expand(-1, 2, -1)
    return clip.pool(as_sequences).unflatten(0, tokens.shape[:2])


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


def cell_weights(
    boxes: npt.NDArray[np.float64], height: int, width: int, grid: int
) -> npt.NDArray[np.float32]:
    """(N, 4) boxes to (N, grid * grid) weights that sum to 1: the cells, row by row, whose centre a
    box holds.

    In an axis in which a box holds no centre, it takes the one nearest to its own.
    """
    centres = (np.arange(grid) + 0.5) / grid
    low, high = boxes[:, :2] / [width, height], boxes[:, 2:] / [width, height]  # (N, 2) xy in 0..1
    within = (low[:, None] <= centres[:, None]) & (
        centres[:, None] <= high[:, None]
    )  # (N, grid, 2)
    nearest = np.abs(centres[:, None] - ((low + high) / 2)[:, None]).argmin(1)  # (N, 2)
    within |= ~within.any(1, keepdims=True) & (np.arange(grid)[:, None] == nearest[:, None])
    cells = (within[:, :, None, 1] & within[:, None, :, 0]).reshape(len(boxes), grid * grid)
    return (cells / cells.sum(1, keepdims=True)).astype(np.float32)


def mask_weights(mask: npt.NDArray[np.bool_], grid: int) -> npt.NDArray[np.float32]:
    """A mask (H, W) that is not empty to (grid * grid,) weights that sum to 1: how much of each
    cell it covers.
    """
    covered = Image.fromarray(mask.astype(np.float32)).resize((grid, grid), Image.Resampling.BOX)
    weights = np.asarray(covered, np.float64).ravel()
    return (weights / weights.sum()).astype(np.float32)
