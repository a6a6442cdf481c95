"""What SAM and CLIP say of a data set's images, kept on disk: in shards, checksummed, resumable.

    <root>/<data set>-<key>/cache.json               what the features depend on, for people
                            shard_00000.safetensors  features of `images_per_shard` images
                            shard_00000.json         its checksum, and one for each image's record

The key is a hash of everything the features depend on, so a changed SAM or data set makes a new cache. Each file is
written aside and renamed, the JSON last: a shard without it is not there yet.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
import xxhash
from torch import Tensor

from regionspot.data.dataset import IntArray, TrainingSet
from regionspot.errors import ArtifactError, InputError
from regionspot.files import file_digest, in_units, write_atomically

FORMAT = 2
FREE_SPACE_MARGIN = 64 << 20  # bytes left free on the disk
OPEN_SHARDS = 128
DAMAGED = (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError)


@dataclass(frozen=True)
class FeatureShape:
    """What is stored of an image of n regions: mask tokens (n, T, C) and, unless None, CLIP's map (L, D)."""

    mask_tokens: tuple[int, int]
    patch_tokens: tuple[int, int] | None
    dtype: str

    def num_bytes(self, images: int, regions: int) -> int:
        size = np.dtype(self.dtype).itemsize
        per_region = size * int(np.prod(self.mask_tokens))
        per_image = size * int(np.prod(self.patch_tokens)) if self.patch_tokens else 0
        return regions * per_region + images * per_image


@dataclass(frozen=True, eq=False)
class Features:
    """Features of n images with r regions altogether, image after image.

    Attributes:
        mask_tokens: (r, T, C).
        patch_tokens: (n, L, D), or None where they are not cached.
    """

    mask_tokens: npt.NDArray[np.floating[Any]]
    patch_tokens: npt.NDArray[np.floating[Any]] | None


class FeatureCache:
    """The features of one training set.

    Args:
        root: the directory of all caches.
        depends_on: what else the features depend on: weights, preprocessing. Plain JSON values.
    """

    def __init__(
        self,
        root: str | Path,
        training_set: TrainingSet,
        shape: FeatureShape,
        depends_on: Mapping[str, Any],
        images_per_shard: int,
    ) -> None:
        self.training_set, self.shape, self.images_per_shard = training_set, shape, images_per_shard
        self.description = {
            "format": FORMAT,
            "images": training_set.image_digest,
            "num_images": len(training_set),
            "num_regions": training_set.num_regions,
            "images_per_shard": images_per_shard,
            "mask_tokens": list(shape.mask_tokens),
            "patch_tokens": list(shape.patch_tokens) if shape.patch_tokens else None,
            "dtype": shape.dtype,
            **depends_on,
        }
        self.key = xxhash.xxh3_128_hexdigest(json.dumps(self.description, sort_keys=True).encode())
        self.directory = Path(root).expanduser() / f"{training_set.name}-{self.key[:16]}"

    @property
    def num_shards(self) -> int:
        return -(-len(self.training_set) // self.images_per_shard)

    def shard_images(self, shard: int) -> IntArray:
        """Indices of a shard's images in the training set."""
        first = shard * self.images_per_shard
        return np.arange(first, min(first + self.images_per_shard, len(self.training_set)))

    def num_bytes(self, shards: list[int] | None = None) -> int:
        """Size of these shards, or of all: an estimate to 1 %, file headers being left out."""
        if shards is None:
            return self.shape.num_bytes(len(self.training_set), self.training_set.num_regions)
        images = [self.shard_images(shard) for shard in shards]
        regions = sum(int(self.training_set.counts[part].sum()) for part in images)
        return self.shape.num_bytes(sum(map(len, images)), regions)

    def shard_path(self, shard: int) -> Path:
        return self.directory / f"shard_{shard:05}.safetensors"

    def missing_shards(self, verify: bool = True) -> tuple[list[int], list[str]]:
        """Shards that must be made, and for those of them that are there but damaged a sentence each.

        Without `verify` nothing is read, and all that are there count as whole.
        """
        missing, complaints = [], []
        for shard in range(self.num_shards):
            if not self.shard_path(shard).exists() or not self._index_path(shard).exists():
                missing.append(shard)
            elif verify and (reason := self._damage(shard)):
                missing.append(shard)
                complaints.append(f"feature shard {self.shard_path(shard)} is damaged ({reason})")
        return missing, complaints

    def write_shard(self, shard: int, features: Features) -> None:
        """Store a shard.

        Raises:
            ArtifactError: it cannot be written; finished shards are kept.
            InputError: a number is infinite or NaN.
        """
        arrays = {"mask_tokens": np.ascontiguousarray(features.mask_tokens)}
        if features.patch_tokens is not None:
            arrays["patch_tokens"] = np.ascontiguousarray(features.patch_tokens)
        self._check_arrays(shard, arrays)
        if not (self.directory / "cache.json").exists():
            write_atomically(self.directory / "cache.json", json.dumps(self.description, indent=2).encode())
        content = safetensors.numpy.save(arrays)
        index = {"xxh3": xxhash.xxh3_64_hexdigest(content), "records": self._record_digests(shard, arrays)}
        write_atomically(self.shard_path(shard), content)
        write_atomically(self._index_path(shard), json.dumps(index).encode())

    def load(self) -> InMemoryFeatures:
        """All features, held in memory. Raises ArtifactError for a damaged shard."""
        features = InMemoryFeatures(self.training_set, self.shape)
        for shard in range(self.num_shards):
            images = self.shard_images(shard)
            first = self.training_set.offsets[images[0]]
            try:
                content = self.shard_path(shard).read_bytes()
                if xxhash.xxh3_64_hexdigest(content) != self.index(shard)["xxh3"]:
                    raise ValueError("its checksum is wrong")
                arrays = safetensors.numpy.load(content)
                tokens = torch.from_numpy(arrays["mask_tokens"])
                features.mask_tokens[first : first + len(tokens)] = tokens
                if features.patch_tokens is not None:
                    features.patch_tokens[images[0] : images[-1] + 1] = torch.from_numpy(arrays["patch_tokens"])
            except DAMAGED as error:
                raise self._damaged(shard, error) from error
        return features

    def open(self) -> OnDiskFeatures:
        """Features that are read from the disk, and verified, image by image."""
        return OnDiskFeatures(self)

    def index(self, shard: int) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._index_path(shard).read_bytes())
        return content

    def _index_path(self, shard: int) -> Path:
        return self.shard_path(shard).with_suffix(".json")

    def _damage(self, shard: int) -> str | None:
        """What is wrong with a shard, None for nothing."""
        try:
            if file_digest(self.shard_path(shard)) == self.index(shard)["xxh3"]:
                return None
            return "its checksum is wrong"
        except DAMAGED as error:
            return str(error)

    def _damaged(self, shard: int, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"feature shard {self.shard_path(shard)} is damaged ({error}): run the same command again, it makes this "
            "shard anew and keeps the others"
        )

    def _check_arrays(self, shard: int, arrays: dict[str, npt.NDArray[Any]]) -> None:
        images = self.shard_images(shard)
        expected = {"mask_tokens": (int(self.training_set.counts[images].sum()), *self.shape.mask_tokens)}
        if self.shape.patch_tokens:
            expected["patch_tokens"] = (len(images), *self.shape.patch_tokens)
        for name, shape in expected.items():
            if arrays[name].shape != shape or arrays[name].dtype != self.shape.dtype:
                raise ValueError(
                    f"{name} of shard {shard} must be {shape} {self.shape.dtype}, got {arrays[name].shape}"
                )
            if not np.isfinite(arrays[name]).all():
                raise InputError(
                    f"{name} of shard {shard} of {self.training_set.name} have infinite or NaN values"
                    + ("; store them with features.dtype=float32" if self.shape.dtype == "float16" else "")
                )

    def _record_digests(self, shard: int, arrays: dict[str, npt.NDArray[Any]]) -> list[str]:
        ends = np.cumsum(self.training_set.counts[self.shard_images(shard)])
        tokens, patches = np.split(arrays["mask_tokens"], ends[:-1]), arrays.get("patch_tokens")
        return [
            record_digest(image_tokens, None if patches is None else patches[row])
            for row, image_tokens in enumerate(tokens)
        ]


def record_digest(mask_tokens: npt.NDArray[Any], patch_tokens: npt.NDArray[Any] | None) -> str:
    """xxh3 of one image's mask tokens and, if there are any, patch tokens."""
    digest = xxhash.xxh3_64(np.ascontiguousarray(mask_tokens).data)
    if patch_tokens is not None:
        digest.update(np.ascontiguousarray(patch_tokens).data)
    return digest.hexdigest()


def check_space(caches: Sequence[FeatureCache], shards: Sequence[list[int]]) -> None:
    """Raises InputError if these shards, a list for each cache of one root, will not fit on the disk together."""
    wanting = [(cache, missing) for cache, missing in zip(caches, shards, strict=True) if missing]
    if not wanting:
        return
    directory, dtype = wanting[0][0].directory, wanting[0][0].shape.dtype
    place = next(p for p in (directory, *directory.absolute().parents) if p.is_dir())
    needed = sum(cache.num_bytes(missing) for cache, missing in wanting) + FREE_SPACE_MARGIN
    free = shutil.disk_usage(place).free
    if free < needed:
        names = " and ".join(cache.training_set.name for cache, _ in wanting)
        raise InputError(
            f"the features of {names} need {in_units(needed)}, but {place} has {in_units(free)} free: free some space, "
            "or name another disk with features.cache_dir=DIR"
            + ("" if dtype == "float16" else ", or halve it with features.dtype=float16")
        )


class InMemoryFeatures:
    """All features of a training set as two contiguous tensors in the cache's precision.

    Attributes:
        mask_tokens: (R, T, C).
        patch_tokens: (I, L, D), or None.
    """

    def __init__(self, training_set: TrainingSet, shape: FeatureShape) -> None:
        dtype = getattr(torch, shape.dtype)
        self._training_set = training_set
        self.mask_tokens = torch.empty((training_set.num_regions, *shape.mask_tokens), dtype=dtype)
        patches = shape.patch_tokens
        self.patch_tokens = None if patches is None else torch.empty((len(training_set), *patches), dtype=dtype)

    def gather(self, images: IntArray) -> tuple[Tensor, Tensor | None]:
        """Mask tokens (r, T, C) of all regions of some images, image after image, and patch tokens (B, L, D)."""
        regions = torch.from_numpy(self._training_set.region_indices(images))
        patches = self.patch_tokens
        return self.mask_tokens[regions], None if patches is None else patches[torch.from_numpy(images)]


class OnDiskFeatures:
    """As `InMemoryFeatures`, read from the shards when asked, each record verified."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    @cached_property
    def _offsets(self) -> IntArray:
        return self._cache.training_set.offsets

    def gather(self, images: IntArray) -> tuple[Tensor, Tensor | None]:
        """As `InMemoryFeatures.gather`. Raises ArtifactError for a damaged record; it names the shard."""
        records = [self._read(int(image)) for image in images]
        tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in records]))
        maps = [patches for _, patches in records if patches is not None]
        return tokens, torch.from_numpy(np.stack(maps)) if maps else None

    def _open_shard(self, shard: int) -> tuple[Any, list[str]]:
        file = safetensors.safe_open(self._cache.shard_path(shard), framework="np")
        return file, self._cache.index(shard)["records"]

    def _read(self, image: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        shard, row = divmod(image, self._cache.images_per_shard)
        start, stop = self._offsets[image : image + 2] - self._offsets[image - row]
        try:
            file, digests = self._shard(shard)
            tokens = file.get_slice("mask_tokens")[int(start) : int(stop)]
            patches = file.get_slice("patch_tokens")[row] if self._cache.shape.patch_tokens else None
            if record_digest(tokens, patches) != digests[row]:
                raise ValueError(f"the record of {self._cache.training_set.file_names[image]} has a wrong checksum")
        except DAMAGED as error:
            raise self._cache._damaged(shard, error) from error
        return tokens, patches
