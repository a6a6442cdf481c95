"""From records of an annotation file to batches of encoded images with their regions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from regionspot.data.coco_json import CocoDataset, ImageRecord
from regionspot.data.extraction import read_upright
from regionspot.masks import Rle
from regionspot.runtime.pipeline import EncodedImages, RegionPipeline
from regionspot.runtime.prepared import ImagePreparation, PreparedBatch, PreparedImage
from regionspot.runtime.scores import best_reading
from regionspot.structures import BoolArray, FloatArray, IntArray, Prompts, UInt8Array
from regionspot.transforms import SamTransform

MASKS_AT_ONCE = 32
ItemT = TypeVar("ItemT")
LoadedT = TypeVar("LoadedT")


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """One image of a data set and its n regions.

    Args:
        record: its entry in the annotation file.
        picture: (H, W, 3) uint8, as it was read.
        boxes: (n, 4) xyxy in original-image pixels.
        prepared: image and boxes as the model takes them.
    """

    record: ImageRecord
    picture: UInt8Array
    boxes: npt.NDArray[np.float64]
    prepared: PreparedImage


@dataclass(frozen=True, eq=False)
class RegionBatch:
    """B encoded images with up to N regions each; images with fewer are padded.

    Args:
        images: the B images.
        valid: (B, N) bool, False for padding.
        mask_tokens: (B, N, T, C) SAM's position-aware tokens: T = 1, or for a head that was trained
            on SAM's multimask tokens 3 readings of each region; None where nothing asked for them.
        iou_predictions: (B, N, T) SAM's estimate for each reading; likewise.
        patch_tokens: (B, L, D) CLIP's feature map; likewise.
        masks: for each image SAM's n masks, at its full size, of the reading with the highest
            estimate; likewise.
    """

    images: Sequence[LoadedImage]
    valid: BoolArray
    mask_tokens: FloatArray | None
    iou_predictions: FloatArray | None
    patch_tokens: FloatArray | None
    masks: Sequence[list[Rle]] | None


def load_image(
    dataset: CocoDataset,
    record: ImageRecord,
    boxes: npt.NDArray[np.float64],
    sam_size: int,
    clip_size: int,
) -> LoadedImage:
    """Read one image and resize it for both encoders; boxes (n, 4) become prompts.

    Raises:
        InputError: it cannot be read, or its size is not the record's.
    """
    height, width = record.height, record.width
    picture = read_upright(dataset.image_path(record), (height, width))
    prompts = Prompts.from_boxes(boxes).validated(height, width)
    return LoadedImage(
        record, picture, boxes, ImagePreparation(sam_size, clip_size).prepare(picture, prompts)
    )


def prefetched(
    batches: Sequence[Sequence[ItemT]], load: Callable[[ItemT], LoadedT]
) -> Iterator[list[LoadedT]]:
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

    pipeline: RegionPipeline
    mask_tokens: bool = True
    patch_tokens: bool = True
    masks: bool = False

    def encode(self, images: Sequence[LoadedImage]) -> RegionBatch:
        """Every image goes through each wanted encoder once."""
        batch = PreparedBatch.stack([image.prepared for image in images])
        mask_tokens, iou_predictions, patch_tokens, masks = None, None, None, None
        if self.mask_tokens or self.masks:
            encoded = self.pipeline.encode_image(batch.sam_images, batch.input_sizes)
            if self.masks:
                mask_tokens, iou_predictions, masks = self._tokens_and_masks(
                    images, encoded, batch.points, batch.labels
                )
            else:
                mask_tokens, iou_predictions = self.pipeline.mask_tokens(
                    encoded, batch.points, batch.labels, self.pipeline.info.multimask
                )
        if self.patch_tokens:
            assert batch.clip_images is not None
            patch_tokens = self.pipeline.encode_clip(batch.clip_images)  # (B, L, D)
        return RegionBatch(images, batch.valid, mask_tokens, iou_predictions, patch_tokens, masks)

    def _tokens_and_masks(
        self,
        images: Sequence[LoadedImage],
        encoded: EncodedImages,
        points: FloatArray,
        labels: IntArray,
    ) -> tuple[FloatArray, FloatArray, list[list[Rle]]]:
        """The tokens (B, N, T, C) and predicted IoUs (B, N, T) of all regions, and the n masks of
        each image.
        """
        transform = SamTransform(self.pipeline.info.sam_image_size)
        masks: list[list[Rle]] = [[] for _ in images]
        tokens, ious = [], []
        step = max(1, MASKS_AT_ONCE // len(images))
        for start in range(0, labels.shape[1], step):
            chunk = slice(start, start + step)
            low_res, found, predicted = self.pipeline.low_res_masks(
                encoded, points[:, chunk], labels[:, chunk], self.pipeline.info.multimask
            )
            tokens.append(found)
            ious.append(predicted)
            drawn = best_reading(low_res.reshape(*low_res.shape[:3], -1), predicted)  # (B, n, 16hw)
            for of_image, image, flat in zip(masks, images, drawn, strict=True):
                own = flat[: max(len(image.boxes) - start, 0)]  # without padding
                of_image += transform.encode_masks(
                    own.reshape(-1, *low_res.shape[3:]), *image.picture.shape[:2]
                ).rles
        return np.concatenate(tokens, axis=1), np.concatenate(ious, axis=1), masks
