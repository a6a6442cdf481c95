"""From images to the feature cache: SAM's mask tokens and CLIP's maps, computed once (spec: "Training recipe")."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor, nn

from regionspot.data.dataset import FloatArray, IntArray, TrainingSet
from regionspot.data.feature_cache import FeatureCache, Features, FeatureShape, check_space
from regionspot.errors import InputError
from regionspot.files import cache_root, delete_leftovers, in_units
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.sam import PADDING_LABEL, SamBackbone
from regionspot.progress import Progress
from regionspot.structures import IntArray as LabelArray
from regionspot.structures import Prompts
from regionspot.transforms import ClipTransform, SamTransform, UInt8Array, read_image

RESIZE = "Pillow bilinear on uint8, antialiased"  # goes into the key of the cache
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image, ready for both encoders: (S, S, 3) uint8 each; points (n, 2, 2) in the SAM frame, labels (n, 2)."""

    sam_image: UInt8Array
    input_size: tuple[int, int]
    points: FloatArray
    labels: LabelArray
    clip_image: UInt8Array | None


class FeatureExtractor:
    """Computes what is cached of each image.

    Args:
        sam: on its device.
        clip: None where maps are not cached.
        multimask: SAM's three mask tokens for a box, T = 3, instead of its single-mask token.
        dtype: "float32" or "float16".
    """

    def __init__(self, sam: SamBackbone, clip: ClipBackbone | None, multimask: bool = False, dtype: str = "float32"):
        self.sam, self.clip, self.multimask, self.dtype = sam, clip, multimask, dtype
        self.sam_transform = SamTransform(sam.image_size)
        self.clip_transform = ClipTransform(clip.image_size) if clip else None

    @property
    def shape(self) -> FeatureShape:
        patches = (self.clip.num_tokens, self.clip.width) if self.clip else None
        return FeatureShape((3 if self.multimask else 1, self.sam.token_dim), patches, self.dtype)

    def depends_on(self) -> dict[str, Any]:
        """What the features depend on besides the images: the cache's key is made from it."""
        return {
            "sam_weights": weights_fingerprint(self.sam),
            "sam_image_size": self.sam.image_size,
            "clip_weights": weights_fingerprint(self.clip.clip.visual) if self.clip else None,
            "clip_image_size": self.clip.image_size if self.clip else None,
            "resize": RESIZE,
            "prompts": "boxes",
            "multimask": self.multimask,
        }

    def prepare(self, path: Path, size: tuple[int, int], boxes: FloatArray) -> PreparedImage:
        """Read an image and bring it and its boxes (n, 4) into the encoders' frames. Thread-safe.

        Raises:
            InputError: the image cannot be read, or is not of the (height, width) that the annotations are for.
        """
        image = read_upright(path, size)
        sam_image, input_size = self.sam_transform.apply_image(image)
        prompts = Prompts.from_boxes(boxes)
        return PreparedImage(
            sam_image,
            input_size,
            self.sam_transform.apply_points(prompts.points, *size),
            prompts.labels,
            self.clip_transform.apply_image(image) if self.clip_transform else None,
        )

    @torch.inference_mode()
    def extract(self, images: list[PreparedImage]) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]:
        """Mask tokens (n, T, C) and the map (L, D) or None of each image."""
        device = self.sam.sam.device
        sam_images = stack_images([image.sam_image for image in images]).to(device)
        input_sizes = torch.tensor([image.input_size for image in images], device=device)
        counts = [len(image.labels) for image in images]
        points = torch.zeros(len(images), max(counts), 2, 2)
        labels = torch.full((len(images), max(counts), 2), PADDING_LABEL)
        for row, image in enumerate(images):
            points[row, : counts[row]] = torch.from_numpy(image.points)
            labels[row, : counts[row]] = torch.from_numpy(image.labels)
        embeddings = self.sam.encode_image(sam_images, input_sizes)  # (B, C, h, w)
        tokens = self.sam.mask_tokens(embeddings, points.to(device), labels.to(device), self.multimask).tokens
        maps: list[Tensor | None] = [None] * len(images)
        if self.clip:
            clip_images = stack_images([image.clip_image for image in images if image.clip_image is not None])
            maps = list(self.clip.encode_image(clip_images.to(device)))
        return [
            (self._stored(tokens[row, :count]), None if patches is None else self._stored(patches))
            for row, (count, patches) in enumerate(zip(counts, maps, strict=True))
        ]

    def _stored(self, features: Tensor) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = features.to(getattr(torch, self.dtype)).cpu().numpy()
        return array


def make_cache(
    root: str | Path | None, training_set: TrainingSet, extractor: FeatureExtractor, images_per_shard: int
) -> FeatureCache:
    """The cache for a training set, found by its key under `root`, or under the default directory. Computes nothing."""
    root = cache_root() / "features" if root is None else root
    return FeatureCache(root, training_set, extractor.shape, extractor.depends_on(), images_per_shard)


def fill_caches(
    caches: Sequence[FeatureCache],
    extractor: FeatureExtractor,
    batch_size: int = 8,
    workers: int = 4,
    say: Callable[[str], None] = print,
) -> None:
    """Make the shards that are missing or damaged; those that are whole are kept.

    Args:
        batch_size: images that go through the encoders at once.
        workers: threads that read images.
        say: takes the size estimates, before anything is computed.

    Raises:
        InputError: an image is unusable, or the disk has not enough space for all, which is looked at first.
        ArtifactError: a shard cannot be written.
    """
    missing = []
    for cache in caches:
        delete_leftovers(cache.directory)
        shards, complaints = cache.missing_shards()
        for complaint in complaints:
            warnings.warn(f"{complaint}; it is made again", stacklevel=2)
        say(describe_cache(cache, shards))
        missing.append(shards)
    check_space(caches, missing)
    for cache, shards in zip(caches, missing, strict=True):
        _fill_cache(cache, shards, extractor, batch_size, workers)


def _fill_cache(
    cache: FeatureCache, missing: list[int], extractor: FeatureExtractor, batch_size: int, workers: int
) -> None:
    done = len(cache.training_set) - sum(len(cache.shard_images(shard)) for shard in missing)
    label = f"features of {cache.training_set.name}"
    with ThreadPoolExecutor(workers) as pool, Progress(label, len(cache.training_set), "images", done) as progress:
        for shard in missing:
            features = _extract_shard(cache, shard, extractor, batch_size, pool, progress)
            cache.write_shard(shard, features)


def describe_cache(cache: FeatureCache, missing: list[int]) -> str:
    """The size estimate: "features of mini: 9000 images, 31500 regions: 231.2 MiB in 18 shards at …, 3 to make …"."""
    shape, training_set = cache.shape, cache.training_set
    what = "SAM's tokens" + (" and CLIP's maps" if shape.patch_tokens else "") + f" in {shape.dtype}"
    todo = f"{len(missing)} to make ({in_units(cache.num_bytes(missing))})" if missing else "all there"
    return (
        f"features of {training_set.name}: {len(training_set)} images, {training_set.num_regions} regions; {what}: "
        f"{in_units(cache.num_bytes())} in {cache.num_shards} shards at {cache.directory}, {todo}"
    )


def _extract_shard(
    cache: FeatureCache,
    shard: int,
    extractor: FeatureExtractor,
    batch_size: int,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> Features:
    training_set, images = cache.training_set, cache.shard_images(shard)
    order = images[np.argsort(training_set.counts[images], kind="stable")]  # alike counts together: little padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    already = progress.done

    def prepare(batch: IntArray) -> list[Future[PreparedImage]]:
        return [pool.submit(_prepare_image, extractor, training_set, int(image)) for image in batch]

    records: dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any] | None]] = {}
    for batch, futures in zip(batches, _ahead(prepare, batches), strict=True):
        extracted = extractor.extract([future.result() for future in futures])
        records |= zip(batch.tolist(), extracted, strict=True)
        progress.update(already + len(records))
    tokens, maps = zip(*(records[image] for image in images.tolist()), strict=True)
    return Features(np.concatenate(tokens), np.stack(maps) if cache.shape.patch_tokens else None)


def _prepare_image(extractor: FeatureExtractor, training_set: TrainingSet, image: int) -> PreparedImage:
    boxes = training_set.boxes[training_set.offsets[image] : training_set.offsets[image + 1]]
    height, width = training_set.sizes[image].tolist()
    return extractor.prepare(training_set.paths[image], (height, width), boxes)


def _ahead(submit: Callable[[Item], Result], items: Iterable[Item], ahead: int = 2) -> Iterator[Result]:
    """`submit` each item, always `ahead` items before its result is asked for."""
    waiting: deque[Result] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def read_upright(path: Path, size: tuple[int, int]) -> UInt8Array:
    """(H, W, 3) uint8. Raises InputError unless the picture has the (height, width) that its annotations are for."""
    image = read_image(path)
    if image.shape[:2] != size:
        raise InputError(
            f"{path} is {image.shape[1]} x {image.shape[0]} pixels (width x height) when upright, but its annotations "
            f"are for {size[1]} x {size[0]}: correct the annotation file, or take the image out of it"
        )
    return image


def stack_images(images: list[UInt8Array]) -> Tensor:
    """B images (S, S, 3) as (B, 3, S, S) uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def weights_fingerprint(module: nn.Module) -> str:
    """32 hexadecimal digits that change with any weight of a module."""
    digest = xxhash.xxh3_128()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
