"""Batches for the head, padded to the most regions of any image and masked, and where they come
from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regionspot.data.dataset import BatchSchedule, IntArray, TrainingSet
from regionspot.data.extraction import read_upright, stack_images
from regionspot.structures import BoolArray, UInt8Array
from regionspot.transforms import ClipTransform

Augmentation = Callable[
    [UInt8Array, npt.NDArray[np.float32], np.random.Generator],
    tuple[UInt8Array, npt.NDArray[np.bool_]],
]
"""Called with an image, its boxes (n, 4) and a generator; the new image, and which regions (n,) to
train on.
"""


@dataclass(frozen=True, eq=False)
class Batch:
    """B images of one data set.

    Attributes:
        dataset: which, counted from 0.
        mask_tokens: (B, N, C) float32, N the most regions of any of them; zero where padded.
        patch_tokens: (B, L, D) float32.
        class_ids: (B, N) int64 into the data set's classes; 0 where padded.
        valid: (B, N) bool, False where padded.
    """

    dataset: int
    mask_tokens: Tensor
    patch_tokens: Tensor
    class_ids: Tensor
    valid: Tensor

    @property
    def num_images(self) -> int:
        return len(self.valid)

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.dataset,
            self.mask_tokens.to(device),
            self.patch_tokens.to(device),
            self.class_ids.to(device),
            self.valid.to(device),
        )


class BatchSource(Protocol):
    """Gives the batch of any step, the same one whenever it is asked."""

    def batch(self, step: int) -> Batch: ...


class FeatureStore(Protocol):
    """`InMemoryFeatures` or `OnDiskFeatures`."""

    def gather(self, images: IntArray) -> tuple[Tensor, Tensor | None]: ...


def pad_regions(
    mask_tokens: Tensor, class_ids: IntArray, counts: IntArray
) -> tuple[Tensor, Tensor, Tensor]:
    """From regions in a row to regions by image.

    With T tokens for a region each token becomes a region of its own.

    Args:
        mask_tokens: (r, T, C), image after image.
        class_ids: (r,).
        counts: (B,) regions of each image.

    Returns:
        Mask tokens (B, N, C) in float32, class ids (B, N) and validity (B, N).
    """
    num_tokens = mask_tokens.shape[1]
    rows = torch.from_numpy(counts * num_tokens)  # (B,)
    valid = torch.arange(int(rows.max())) < rows[:, None]  # (B, N)
    padded = torch.zeros(*valid.shape, mask_tokens.shape[2])
    padded[valid] = mask_tokens.flatten(0, 1).float()
    classes = torch.zeros(valid.shape, dtype=torch.int64)
    classes[valid] = torch.from_numpy(class_ids.repeat(num_tokens))
    return padded, classes, valid


@dataclass(frozen=True)
class RegionLimit:
    """Takes at most `most` regions of an image into a batch, all if None: memory grows with the
    most crowded image.

    Which ones is drawn anew in each step, as a function of the seed, the step and the place in the
    batch.
    """

    most: int | None = None
    seed: int = 0

    def apply(self, shown: Sequence[BoolArray], step: int) -> list[BoolArray]:
        """Thins out the regions to train on, a mask (n,) for each image of a step's batch."""
        return [self._thinned(mask, step, place) for place, mask in enumerate(shown)]

    def _thinned(self, shown: BoolArray, step: int, place: int) -> BoolArray:
        candidates = np.flatnonzero(shown)
        if self.most is None or len(candidates) <= self.most:
            return shown
        kept = np.zeros_like(shown)
        kept[
            np.random.default_rng([self.seed, 4, step, place]).choice(
                candidates, self.most, replace=False
            )
        ] = True
        return kept


def regions_of(
    training_set: TrainingSet, store: FeatureStore, images: IntArray, keep: Sequence[BoolArray]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Reads the features of some images, with the regions that `keep` has a True for, a mask (n,)
    for each image.

    Returns:
        Mask tokens, classes and validity as from `pad_regions`, and patch tokens (B, L, D) if they
        are cached.
    """
    mask_tokens, patch_tokens = store.gather(images)
    class_ids = training_set.class_ids[training_set.region_indices(images)]
    kept, counts = np.concatenate(keep), np.array([mask.sum() for mask in keep], np.int64)
    return pad_regions(mask_tokens[torch.from_numpy(kept)], class_ids[kept], counts), patch_tokens


class CachedBatches:
    """Batches made of cached features alone."""

    def __init__(
        self,
        sets: list[TrainingSet],
        stores: list[FeatureStore],
        schedule: BatchSchedule,
        limit: RegionLimit = RegionLimit(),
    ) -> None:
        self._sets, self._stores, self._schedule, self._limit = sets, stores, schedule, limit

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        dataset, images = self._schedule.batch(step)
        training_set = self._sets[dataset]
        keep = self._limit.apply(
            [np.ones(count, bool) for count in training_set.counts[images]], step
        )
        (tokens, classes, valid), patch_tokens = regions_of(
            training_set, self._stores[dataset], images, keep
        )
        assert patch_tokens is not None, "the cache was made without CLIP's maps"
        return Batch(dataset, tokens, patch_tokens.float(), classes, valid)


class AugmentedBatches:
    """Batches whose CLIP images are read, varied and encoded anew at each step; mask tokens come
    from the cache.

    Threads read the images of the next steps meanwhile. Use as a context manager.

    Args:
        encode: CLIP's maps (B, L, D) of images (B, 3, S, S) uint8.
        seed: what an image looks like is a function of it, the step and the place in the batch.
    """

    STEPS_AHEAD = 2

    def __init__(
        self,
        sets: list[TrainingSet],
        stores: list[FeatureStore],
        schedule: BatchSchedule,
        augmentation: Augmentation,
        transform: ClipTransform,
        encode: Callable[[Tensor], Tensor],
        seed: int,
        workers: int,
        limit: RegionLimit = RegionLimit(),
    ) -> None:
        self._sets, self._stores, self._schedule = sets, stores, schedule
        self._augmentation = augmentation
        self._transform = transform
        self._encode = encode
        self._seed = seed
        self._limit = limit
        self._pool = ThreadPoolExecutor(workers)
        self._waiting: dict[int, list[Future[tuple[UInt8Array, npt.NDArray[np.bool_]]]]] = {}

    def __enter__(self) -> AugmentedBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        self._waiting = {s: futures for s, futures in self._waiting.items() if s >= step}
        for ahead in range(step, step + 1 + self.STEPS_AHEAD):
            if ahead not in self._waiting:
                self._waiting[ahead] = self._submit(ahead)
        images, shown = zip(*(future.result() for future in self._waiting.pop(step)), strict=True)
        dataset, indices = self._schedule.batch(step)
        keep = self._limit.apply(shown, step)
        (tokens, classes, valid), _ = regions_of(
            self._sets[dataset], self._stores[dataset], indices, keep
        )
        return Batch(
            dataset, tokens, self._encode(stack_images(list(images))).float(), classes, valid
        )

    def _submit(self, step: int) -> list[Future[tuple[UInt8Array, npt.NDArray[np.bool_]]]]:
        dataset, images = self._schedule.batch(step)
        return [
            self._pool.submit(self._read, self._sets[dataset], int(image), step, place)
            for place, image in enumerate(images)
        ]

    def _read(
        self, training_set: TrainingSet, image: int, step: int, place: int
    ) -> tuple[UInt8Array, npt.NDArray[np.bool_]]:
        rng = np.random.default_rng([self._seed, 3, step, place])
        height, width = training_set.sizes[image].tolist()
        boxes = training_set.boxes[training_set.offsets[image] : training_set.offsets[image + 1]]
        varied, shown = self._augmentation(
            read_upright(training_set.paths[image], (height, width)), boxes, rng
        )
        return self._transform.apply_image(varied, threads=1), shown
