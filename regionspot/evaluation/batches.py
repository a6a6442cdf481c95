"""From records of an annotation file to batches of encoded images with their regions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from regionspot.data.coco_json import CocoDataset, ImageRecord
from regionspot.data.extraction import read_upright, stack_images
from regionspot.masks import encode_rle
from regionspot.modeling.regionspot import RegionSpot
from regionspot.structures import PADDING, Prompts, Rle
from regionspot.transforms import ClipTransform, SamTransform, UInt8Array

ItemT = TypeVar("ItemT")
LoadedT = TypeVar("LoadedT")


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """One image as both encoders take it, and its n regions.

    Args:
        record: its entry in the annotation file.
        picture: (H, W, 3) uint8, as it was read.
        boxes: (n, 4) xyxy in original-image pixels.
        sam_image, sam_input_size: (S, S, 3) uint8 in the SAM frame, and the (height, width) of its valid part.
        clip_image: (S', S', 3) uint8.
        points, labels: (n, 2, 2) in the SAM frame and (n, 2): the boxes as prompts.
    """

    record: ImageRecord
    picture: UInt8Array
    boxes: npt.NDArray[np.float64]
    sam_image: UInt8Array
    sam_input_size: tuple[int, int]
    clip_image: UInt8Array
    points: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class RegionBatch:
    """B encoded images with up to N regions each; images with fewer are padded.

    Args:
        images: the B images.
        valid: (B, N) bool, False for padding.
        mask_tokens: (B, N, C) SAM's position-aware tokens; None where nothing asked for them.
        patch_tokens: (B, L, D) CLIP's feature map; likewise.
        masks: for each image SAM's n masks, at its full size; likewise.
    """

    images: Sequence[LoadedImage]
    valid: Tensor
    mask_tokens: Tensor | None
    patch_tokens: Tensor | None
    masks: Sequence[list[Rle]] | None


def load_image(
    dataset: CocoDataset, record: ImageRecord, boxes: npt.NDArray[np.float64], sam_size: int, clip_size: int
) -> LoadedImage:
    """Read one image and resize it for both encoders; boxes (n, 4) become prompts.

    Raises:
        InputError: it cannot be read, or its size is not the record's.
    """
    height, width = record.height, record.width
    picture = read_upright(dataset.image_path(record), (height, width))
    sam_transform = SamTransform(sam_size)
    sam_image, sam_input_size = sam_transform.apply_image(picture)
    prompts = Prompts.from_boxes(boxes).validated(height, width)
    return LoadedImage(
        record,
        picture,
        boxes,
        sam_image,
        sam_input_size,
        ClipTransform(clip_size).apply_image(picture),
        torch.from_numpy(sam_transform.apply_points(prompts.points, height, width)),
        torch.from_numpy(prompts.labels),
    )


def prefetched(batches: Sequence[Sequence[ItemT]], load: Callable[[ItemT], LoadedT]) -> Iterator[list[LoadedT]]:
    """Load the next batch in a thread while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(load, item) for item in batches[0]] if batches else []
        for index in range(len(batches)):
            loaded = [future.result() for future in pending]
            upcoming = batches[index + 1] if index + 1 < len(batches) else ()
            pending = [pool.submit(load, item) for item in upcoming]
            yield loaded


@dataclass(frozen=True)
class BatchEncoder:
    """The frozen part of the model over a batch of images; what is not wanted is not computed."""

    model: RegionSpot
    mask_tokens: bool = True
    patch_tokens: bool = True
    masks: bool = False

    def encode(self, images: Sequence[LoadedImage]) -> RegionBatch:
        """Every image goes through each wanted encoder once."""
        device = self.model.device
        points, labels, valid = (tensor.to(device) for tensor in _pad_prompts(images))
        mask_tokens, patch_tokens, masks = None, None, None
        if self.mask_tokens or self.masks:
            sizes = torch.tensor([image.sam_input_size for image in images], device=device)
            pixels = stack_images([image.sam_image for image in images]).to(device)
            embeddings = self.model.sam.encode_image(pixels, sizes)  # (B, C, h, w)
            if self.masks:
                pairs = zip(images, embeddings.split(1), strict=True)
                of_images, masks = zip(*(self._tokens_and_masks(*pair) for pair in pairs), strict=True)
                mask_tokens = pad_sequence(list(of_images), batch_first=True)  # (B, N, C)
            else:
                mask_tokens = self.model.sam.mask_tokens(embeddings, points, labels).tokens[:, :, 0]  # (B, N, C)
        if self.patch_tokens:
            pixels = stack_images([image.clip_image for image in images]).to(device)
            patch_tokens = self.model.clip.encode_image(pixels)  # (B, L, D)
        return RegionBatch(images, valid, mask_tokens, patch_tokens, masks)

    def _tokens_and_masks(self, image: LoadedImage, image_embedding: Tensor) -> tuple[Tensor, list[Rle]]:
        """Of one image (1, C, h, w): the tokens (n, C) of its regions and their masks, drawn one by one."""
        sam, device = self.model.sam, self.model.device
        points, labels = image.points[None].to(device), image.labels[None].to(device)
        low_res_masks, found = sam.low_res_masks(image_embedding, points, labels)  # (1, n, 1, 4h, 4w)
        low_res = low_res_masks[0, :, 0].float().cpu().numpy()  # (n, 4h, 4w)
        upscaled = SamTransform(sam.image_size).upscale_masks(low_res, *image.picture.shape[:2])
        return found.tokens[0, :, 0], [encode_rle(mask) for mask in upscaled]


def _pad_prompts(images: Sequence[LoadedImage]) -> tuple[Tensor, Tensor, Tensor]:
    """Points (B, N, 2, 2) in the SAM frame, labels (B, N, 2), valid (B, N), N that of the image with most regions."""
    num_regions = max(len(image.boxes) for image in images)
    points = torch.zeros(len(images), num_regions, 2, 2)
    labels = torch.full((len(images), num_regions, 2), PADDING, dtype=torch.int32)
    valid = torch.zeros(len(images), num_regions, dtype=torch.bool)
    for row, image in enumerate(images):
        n = len(image.boxes)
        points[row, :n], labels[row, :n], valid[row, :n] = image.points, image.labels, True
    return points, labels, valid
