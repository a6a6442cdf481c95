"""From images to the feature cache: SAM's mask tokens and CLIP's maps, computed once (spec:
"Training recipe").
"""

from __future__ import annotations

import errno
import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regionspot.data.dataset import FloatArray, IntArray, TrainingSet
from regionspot.data.feature_cache import FeatureCache, Features, FeatureShape, check_space
from regionspot.errors import InputError, first_few
from regionspot.files import cache_root, delete_leftovers, in_units
from regionspot.images import read_image
from regionspot.progress import Progress
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.runtime.prepared import ImagePreparation, PreparedBatch, PreparedImage
from regionspot.structures import Prompts, UInt8Array
from regionspot.transforms import RESIZE

logger = logging.getLogger(__name__)

WAIT_S = 0.2  # between looks at shards that other processes are making

Item = TypeVar("Item")
Result = TypeVar("Result")


class FeatureExtractor:
    """Computes what is cached of each image.

    Args:
        pipeline: of the model, or of its towers alone, in any runtime.
        maps: cache CLIP's maps too.
        multimask: SAM's three mask tokens for a box, T = 3, instead of its single-mask token.
        dtype: "float32" or "float16".
    """

    def __init__(
        self,
        pipeline: RegionPipeline,
        maps: bool = True,
        multimask: bool = False,
        dtype: str = "float32",
    ) -> None:
        self.pipeline, self.maps, self.multimask, self.dtype = pipeline, maps, multimask, dtype
        info = pipeline.info
        self.preparation = ImagePreparation(
            info.sam_image_size, info.clip_image_size if maps else None
        )

    @property
    def shape(self) -> FeatureShape:
        info = self.pipeline.info
        patches = (info.num_patch_tokens, info.clip_width) if self.maps else None
        return FeatureShape((3 if self.multimask else 1, info.token_dim), patches, self.dtype)

    def depends_on(self) -> dict[str, Any]:
        """What the features depend on besides the images: the cache's key is made from it.

        The weights are those of PyTorch's modules, or the SHA-256 of the artefacts that stand for
        them.
        """
        return {
            "sam_weights": self.pipeline.sam_fingerprint(),
            "sam_image_size": self.pipeline.info.sam_image_size,
            "clip_weights": self.pipeline.clip_fingerprint() if self.maps else None,
            "clip_image_size": self.pipeline.info.clip_image_size if self.maps else None,
            "resize": RESIZE,
            "prompts": "boxes",
            "multimask": self.multimask,
        }

    def prepare(self, path: Path, size: tuple[int, int], boxes: FloatArray) -> PreparedImage:
        """Read an image and bring it and its boxes (n, 4) into the encoders' frames, on one thread.
        Thread-safe.

        Raises:
            InputError: the image cannot be read, or is not of the (height, width) that the
                annotations are for.
        """
        return self.preparation.prepare(
            read_upright(path, size), Prompts.from_boxes(boxes), threads=1
        )

    def prepare_item(self, training_set: TrainingSet, index: int) -> PreparedImage:
        """`prepare` of an image of a training set and its boxes."""
        boxes = training_set.boxes[training_set.offsets[index] : training_set.offsets[index + 1]]
        height, width = training_set.sizes[index].tolist()
        return self.prepare(training_set.paths[index], (height, width), boxes)

    def extract(
        self, images: list[PreparedImage]
    ) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]:
        """Mask tokens (n, T, C) and the map (L, D) or None of each image."""
        batch = PreparedBatch.stack(images)
        encoded = self.pipeline.encode_image(batch.sam_images, batch.input_sizes)
        tokens, _ = self.pipeline.mask_tokens(
            encoded, batch.points, batch.labels, self.multimask
        )  # (B, N, T, C)
        maps: Sequence[FloatArray | None] = [None] * len(images)
        if batch.clip_images is not None:
            maps = list(self.pipeline.encode_clip(batch.clip_images))
        return [
            (
                self._stored(own_tokens[: len(image.labels)]),
                None if own_map is None else self._stored(own_map),
            )
            for image, own_tokens, own_map in zip(images, tokens, maps, strict=True)
        ]

    def _stored(self, features: FloatArray) -> npt.NDArray[Any]:
        with np.errstate(over="ignore"):  # the cache refuses what is infinite, and says what to do
            return features.astype(self.dtype)


def make_cache(
    root: str | Path | None,
    training_set: TrainingSet,
    extractor: FeatureExtractor,
    images_per_shard: int,
) -> FeatureCache:
    """The cache for a training set, found by its key under `root`, or under the default directory.
    Computes nothing.
    """
    root = cache_root() / "features" if root is None else root
    return FeatureCache(
        root, training_set, extractor.shape, extractor.depends_on(), images_per_shard
    )


def fill_caches(
    caches: Sequence[FeatureCache],
    extractor: FeatureExtractor,
    batch_size: int = 8,
    workers: int = 4,
    *,
    max_skipped: float | None = None,
    verify: bool = False,
) -> None:
    """Makes the shards that are missing or damaged; those that are whole are kept. Logs size
    estimates first.

    Several processes may fill the same caches: each makes the shards that no other one is making.

    Args:
        batch_size: images that go through the encoders at once.
        workers: threads that read images.
        max_skipped: None stops at an image that cannot be used, and tries those again that an
            earlier call skipped. A fraction skips such images (see `FeatureCache.skipped`), until
            more than that of a data set are skipped.
        verify: read and verify all shards that are there, not only those that were touched.

    Raises:
        InputError: an image is unusable, or too many are, or the disk has not enough space for all,
            which is looked at first.
        ArtifactError: a shard cannot be written.
    """
    work = [_Work.find(cache, max_skipped, verify) for cache in caches]
    for one in work:
        for complaint in one.complaints:
            warnings.warn(f"{complaint}; it is made again", stacklevel=2)
        logger.info(describe_cache(one.cache, one.missing))
    check_space(caches, [one.missing for one in work])
    for one in work:
        if one.missing:
            _fill_cache(one, extractor, batch_size, workers)


@dataclass(frozen=True)
class _Work:
    """What is to be made of a cache.

    Attributes:
        missing: shards to make.
        absent: those of them that did not exist; the others are damaged, or skip images that are to
            be tried again.
        complaints: a sentence about each damaged shard.
    """

    cache: FeatureCache
    missing: list[int]
    absent: frozenset[int]
    complaints: list[str]
    skipping: _Skipping

    @classmethod
    def find(cls, cache: FeatureCache, max_skipped: float | None, verify: bool) -> _Work:
        delete_leftovers(cache.directory)
        # before any other look: another process may be making them
        absent = frozenset(cache.absent_shards())
        missing, complaints = cache.missing_shards(verify)
        skipped = cache.skipped(sorted({*range(cache.num_shards)} - {*missing}))
        if max_skipped is None:
            missing = sorted({*missing, *(cache.shard_of(image)[0] for image in skipped)})
        return cls(
            cache, missing, absent, complaints, _Skipping(cache.training_set, max_skipped, skipped)
        )

    def made_meanwhile(self, shard: int) -> bool:
        """Whether another process has made a shard that was absent, with an outcome that this one
        accepts.
        """
        if shard not in self.absent or not self.cache.shard_path(shard).exists():
            return False
        return self.skipping.accept(self.cache.skipped([shard]))


def _is_of_the_disk(error: InputError) -> bool:
    """Whether the file system failed, and not the image; a file that is missing is the image's
    fault.
    """
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)


class _Skipping:
    """Decides whether an image that cannot be used is skipped, and counts those that are.

    Args:
        max_skipped: as in `fill_caches`.
        earlier: those that finished shards skip.
    """

    def __init__(
        self, training_set: TrainingSet, max_skipped: float | None, earlier: Mapping[int, str]
    ) -> None:
        self._set, self._max_skipped = training_set, max_skipped
        self._skipped: dict[int, str] = {}
        self.accept(earlier)

    def accept(self, skipped: Mapping[int, str]) -> bool:
        """Counts the images that a finished shard skips. Returns whether the shard can stay as it
        is.

        Raises:
            InputError: too many are skipped.
        """
        if self._max_skipped is None:
            return not skipped
        self._skipped |= skipped
        self._check()
        return True

    def add(self, image: int, error: InputError) -> str:
        """Skips an image.

        Returns:
            The reason.

        Raises:
            InputError: images are not to be skipped, or too many are.
        """
        if _is_of_the_disk(error):  # may pass: the image itself may be whole
            raise error
        if self._max_skipped is None:
            raise InputError(
                f"{error}. (features.on_error=skip leaves such images out.)"
            ) from error
        self.accept({image: str(error)})
        return str(error)

    def _check(self) -> None:
        limit = min(math.ceil((self._max_skipped or 0) * len(self._set)), len(self._set) - 1)
        if len(self._skipped) > limit:
            reasons = first_few(self._skipped.values())
            raise InputError(
                f"more than {limit} of the {len(self._set)} images of {self._set.name} cannot be "
                f"used: {reasons}. Correct the data set, or raise features.max_skipped"
            )


def _fill_cache(work: _Work, extractor: FeatureExtractor, batch_size: int, workers: int) -> None:
    """Makes the missing shards of a cache, and waits for those that other processes are making."""
    cache, missing = work.cache, work.missing
    done = len(cache.training_set) - sum(len(cache.shard_images(shard)) for shard in missing)
    label = f"features of {cache.training_set.name}"
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress(label, len(cache.training_set), "images", done) as progress,
    ):
        while missing:
            held_by_others = []
            for shard in missing:
                with cache.claim(shard) as claimed:
                    if not claimed:
                        held_by_others.append(shard)
                    elif work.made_meanwhile(shard):
                        progress.update(progress.done + len(cache.shard_images(shard)))
                    else:
                        features = _extract_shard(
                            cache, shard, extractor, batch_size, pool, progress, work.skipping
                        )
                        cache.write_shard(shard, features)
            if len(held_by_others) == len(missing):
                time.sleep(WAIT_S)
            missing = held_by_others


def describe_cache(cache: FeatureCache, missing: list[int]) -> str:
    """The size estimate: "features of mini: 9000 images, 31500 regions: 231.2 MiB in 18 shards at
    …, 3 to make …".
    """
    shape, training_set = cache.shape, cache.training_set
    what = (
        "SAM's tokens" + (" and CLIP's maps" if shape.patch_tokens else "") + f" in {shape.dtype}"
    )
    todo = (
        f"{len(missing)} to make ({in_units(cache.num_bytes(missing))})" if missing else "all there"
    )
    unused = cache.unused_files()
    others = (
        f"; {len(unused)} more files are of earlier states of this data set, or of another one "
        "with its name: --delete-unused deletes them"
    )
    return (
        f"features of {training_set.name}: {len(training_set)} images, {training_set.num_regions} "
        f"regions; {what}: {in_units(cache.num_bytes())} in {cache.num_shards} shards at "
        f"{cache.directory}, {todo}{others if unused else ''}"
    )


def _extract_shard(
    cache: FeatureCache,
    shard: int,
    extractor: FeatureExtractor,
    batch_size: int,
    pool: ThreadPoolExecutor,
    progress: Progress,
    skipping: _Skipping,
) -> Features:
    training_set, images = cache.training_set, cache.shard_images(shard)
    # alike counts together: little padding
    order = images[np.argsort(training_set.counts[images], kind="stable")]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    already = progress.done

    def prepare(batch: IntArray) -> list[Future[PreparedImage]]:
        return [pool.submit(extractor.prepare_item, training_set, int(image)) for image in batch]

    features = _zeros(cache, images)
    offsets = np.cumsum(training_set.counts[images]) - training_set.counts[images]
    skipped: dict[int, str] = {}
    done = 0
    for batch, futures in zip(batches, _ahead(prepare, batches), strict=True):
        prepared: dict[int, PreparedImage] = {}  # by row of the shard
        for image, future in zip(batch.tolist(), futures, strict=True):
            row = image - int(images[0])
            try:
                prepared[row] = future.result()
            except InputError as error:
                skipped[row] = skipping.add(image, error)
        extracted = extractor.extract(list(prepared.values())) if prepared else []
        for row, (tokens, patches) in zip(prepared, extracted, strict=True):
            features.mask_tokens[offsets[row] : offsets[row] + len(tokens)] = tokens
            if features.patch_tokens is not None:
                features.patch_tokens[row] = patches
        done += len(batch)
        progress.update(already + done)
    return replace(features, skipped=skipped)


def _zeros(cache: FeatureCache, images: IntArray) -> Features:
    """Room for the features of a shard's images."""
    shape, regions = cache.shape, int(cache.training_set.counts[images].sum())
    patches = (
        None
        if shape.patch_tokens is None
        else np.zeros((len(images), *shape.patch_tokens), shape.dtype)
    )
    return Features(np.zeros((regions, *shape.mask_tokens), shape.dtype), patches)


def _ahead(
    submit: Callable[[Item], Result], items: Iterable[Item], ahead: int = 2
) -> Iterator[Result]:
    """`submit` each item, always `ahead` items before its result is asked for."""
    waiting: deque[Result] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def read_upright(path: Path, size: tuple[int, int]) -> UInt8Array:
    """(H, W, 3) uint8. Raises InputError unless the picture has the (height, width) that its
    annotations are for.
    """
    image = read_image(path)
    if image.shape[:2] != size:
        raise InputError(
            f"{path} is {image.shape[1]} x {image.shape[0]} pixels (width x height) when upright, "
            f"but its annotations are for {size[1]} x {size[0]}: correct the annotation file, or "
            "take the image out of it"
        )
    return image


def stack_images(images: list[UInt8Array]) -> Tensor:
    """B images (S, S, 3) as (B, 3, S, S) uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
