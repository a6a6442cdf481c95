"""An image and its regions as the encoders and the token decoder take them, and batches of
these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regionspot.structures import PADDING, BoolArray, FloatArray, IntArray, Prompts, UInt8Array
from regionspot.transforms import ClipTransform, SamTransform, model_inputs


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image and its n regions.

    Args:
        sam_image: (S, S, 3) uint8, in the SAM frame.
        input_size: (height, width) of the part of it that is not padding.
        clip_image: (S', S', 3) uint8; None where CLIP is not wanted.
        points: (n, P, 2) xy in the SAM frame.
        labels: (n, P), see `Prompts`.
    """

    sam_image: UInt8Array
    input_size: tuple[int, int]
    clip_image: UInt8Array | None
    points: FloatArray
    labels: IntArray


class ImagePreparation:
    """Brings images and their regions into the frames of a model. Safe to share between threads.

    Args:
        sam_image_size: side S of SAM's square input, in pixels.
        clip_image_size: side S' of CLIP's square input; None where CLIP is not wanted.
    """

    def __init__(self, sam_image_size: int, clip_image_size: int | None) -> None:
        self.sam_transform = SamTransform(sam_image_size)
        self.clip_transform = None if clip_image_size is None else ClipTransform(clip_image_size)

    def prepare(
        self, image: UInt8Array, prompts: Prompts, threads: int | None = None
    ) -> PreparedImage:
        """Resizes an image (H, W, 3) for both encoders, and takes its prompts into the SAM frame.

        Args:
            prompts: in pixels of the image.
            threads: of resizing; None leaves it to the transforms.
        """
        clip_image = None
        if self.clip_transform is None:
            sam_image, input_size = self.sam_transform.apply_image(image, threads)
        else:
            sam_image, input_size, clip_image = model_inputs(
                image, self.sam_transform, self.clip_transform, threads
            )
        height, width = image.shape[:2]
        points = self.sam_transform.apply_points(prompts.points, height, width)
        return PreparedImage(sam_image, input_size, clip_image, points, prompts.labels)


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """B images with N regions each, padded.

    Args:
        sam_images: (B, S, S, 3) uint8.
        input_sizes: (B, 2) int32, height and width.
        clip_images: (B, S', S', 3) uint8; None where CLIP is not wanted.
        points: (B, N, P, 2).
        labels: (B, N, P); padded prompts ask nothing.
        valid: (B, N), False for padding.
    """

    sam_images: UInt8Array
    input_sizes: IntArray
    clip_images: UInt8Array | None
    points: FloatArray
    labels: IntArray
    valid: BoolArray

    @classmethod
    def stack(
        cls, images: Sequence[PreparedImage], num_regions: int | None = None
    ) -> PreparedBatch:
        """Stacks one or more images whose prompts have the same number of points.

        Args:
            num_regions: N; further regions of an image are left out. None takes the largest number
                of any image.
        """
        if num_regions is None:
            num_regions = max(len(image.labels) for image in images)
        num_points = images[0].labels.shape[1]
        points = np.zeros((len(images), num_regions, num_points, 2), np.float32)
        labels = np.full((len(images), num_regions, num_points), PADDING, np.int32)
        valid = np.zeros((len(images), num_regions), np.bool_)
        for row, image in enumerate(images):
            count = min(len(image.labels), num_regions)
            points[row, :count] = image.points[:count]
            labels[row, :count] = image.labels[:count]
            valid[row, :count] = True
        clip_images = [image.clip_image for image in images if image.clip_image is not None]
        return cls(
            np.stack([image.sam_image for image in images]),
            np.array([image.input_size for image in images], np.int32),
            np.stack(clip_images) if clip_images else None,
            points,
            labels,
            valid,
        )
