"""What SAM and CLIP say of a data set's images, kept on disk: in shards, checksummed, resumable,
found by content.

    <root>/<data set>-<key>/
        cache.json             what the features depend on besides the images, for people
        <digest>.safetensors   a shard: the features of up to `images_per_shard` images
        .<digest>.lock         while a process makes that shard

The key is a hash of the weights and of everything else that the features depend on besides the
images. The digest of a shard is a hash of its own images: their names, sizes in bytes and boxes. So
correcting an annotation costs one shard, and a data set that grows keeps what it has (see
`shard_starts`). A shard is written aside and renamed; its header holds a checksum of each image's
record and the time when it was written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
import xxhash
from torch import Tensor

from regionspot.data.dataset import IntArray, TrainingSet
from regionspot.errors import ArtifactError, InputError
from regionspot.files import expand_home, in_units, why_not_written, write_atomically

FORMAT = 3
FREE_SPACE_MARGIN = 64 << 20  # bytes left free on the disk
OPEN_SHARDS = 128
TIME_BACK_S = 60
"""A shard's time is set back this far, so that even what is done to it at once changes its time."""

DAMAGED = (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError)


@dataclass(frozen=True)
class FeatureShape:
    """What is stored of an image of n regions: mask tokens (n, T, C) and, unless None, CLIP's map
    (L, D).
    """

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
        skipped: row of an image that has no features -> why; its numbers are zeros.
    """

    mask_tokens: npt.NDArray[np.floating[Any]]
    patch_tokens: npt.NDArray[np.floating[Any]] | None
    skipped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        records: checksum of each image's record.
        skipped: row of an image that could not be used -> why.
        written: seconds since 1970, `TIME_BACK_S` before it was written. The file's own time until
            it is changed.
    """

    records: tuple[str, ...]
    skipped: Mapping[int, str]
    written: int

    @classmethod
    def read(cls, file: Any) -> ShardHeader:
        """Reads the header of an open safetensors file. Raises KeyError, ValueError or TypeError
        for a foreign one.
        """
        metadata = file.metadata() or {}
        if xxhash.xxh3_64_hexdigest(metadata["shard"].encode()) != metadata["xxh3"]:
            raise ValueError("the checksum of its header is wrong")
        content = json.loads(metadata["shard"])
        skipped = {int(row): str(why) for row, why in content["skipped"].items()}
        return cls(tuple(content["records"]), skipped, int(content["written"]))

    def to_metadata(self) -> dict[str, str]:
        text = json.dumps(
            {"records": self.records, "skipped": dict(self.skipped), "written": self.written}
        )
        return {"shard": text, "xxh3": xxhash.xxh3_64_hexdigest(text.encode())}


def shard_starts(file_names: Sequence[str], most: int) -> list[int]:
    """Cuts a list of images into shards of at most `most`, so that a change of the list changes few
    shards.

    A shard ends, somewhere between half of `most` and `most` images, where the hash of the next
    image's name is smallest. The cuts follow from names near them, so behind an image that was
    taken out or added they soon are the old ones (content-defined chunking): on average a change
    costs one shard.

    Returns:
        The index of each shard's first image.
    """
    names = (name.encode("utf-8", "surrogatepass") for name in file_names)
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, names), np.uint64)
    starts, least = [0], max(1, most // 2)
    while len(hashes) - starts[-1] > most:
        window = hashes[starts[-1] + least : starts[-1] + most + 1]
        starts.append(starts[-1] + least + int(window.argmin()))
    return starts


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
        self.training_set, self.shape = training_set, shape
        self.description = {
            "format": FORMAT,
            "mask_tokens": list(shape.mask_tokens),
            "patch_tokens": list(shape.patch_tokens) if shape.patch_tokens else None,
            "dtype": shape.dtype,
            **depends_on,
        }
        self.key = xxhash.xxh3_128_hexdigest(json.dumps(self.description, sort_keys=True).encode())
        self.directory = (
            expand_home(root, "features.cache_dir") / f"{training_set.name}-{self.key[:16]}"
        )
        self.starts = np.array(shard_starts(training_set.file_names, images_per_shard), np.int64)

    @property
    def num_shards(self) -> int:
        return len(self.starts)

    def shard_images(self, shard: int) -> IntArray:
        """Indices of a shard's images in the training set."""
        part = self._slice(shard)
        return np.arange(part.start, part.stop)

    def shard_of(self, image: int) -> tuple[int, int]:
        """The shard of an image, and its row there."""
        shard = int(np.searchsorted(self.starts, image, "right")) - 1
        return shard, image - int(self.starts[shard])

    def num_bytes(self, shards: list[int] | None = None) -> int:
        """Size of these shards, or of all: an estimate to 1 %, file headers being left out."""
        if shards is None:
            return self.shape.num_bytes(len(self.training_set), self.training_set.num_regions)
        images = [self.shard_images(shard) for shard in shards]
        regions = sum(int(self.training_set.counts[part].sum()) for part in images)
        return self.shape.num_bytes(sum(map(len, images)), regions)

    def shard_path(self, shard: int) -> Path:
        return self.directory / f"{self._digests[shard]}.safetensors"

    def missing_shards(self, verify: bool = False) -> tuple[list[int], list[str]]:
        """Finds the shards that must be made.

        A shard that was not touched since it was written counts as whole without being read: each
        record is verified when it is used. One whose time is another than its header says is read
        and verified.

        Args:
            verify: read all.

        Returns:
            The shards, and for those of them that are there but damaged a sentence each.
        """
        missing, complaints = [], []
        for shard in range(self.num_shards):
            if not self.shard_path(shard).exists():
                missing.append(shard)
            elif reason := self._damage(shard, verify):
                missing.append(shard)
                complaints.append(f"feature shard {self.shard_path(shard)} is damaged ({reason})")
        return missing, complaints

    def absent_shards(self) -> list[int]:
        """The shards that are not there, without a look into any file."""
        return [shard for shard in range(self.num_shards) if not self.shard_path(shard).exists()]

    def skipped(self, shards: Sequence[int] | None = None) -> dict[int, str]:
        """The images of finished shards that have no features, and why. Raises ArtifactError for a
        damaged shard.
        """
        found = {}
        for shard in range(self.num_shards) if shards is None else shards:
            for row, why in self.header(shard).skipped.items():
                found[int(self.starts[shard]) + row] = why
        return found

    def write_shard(self, shard: int, features: Features) -> None:
        """Stores a shard.

        Raises:
            ArtifactError: it cannot be written; finished shards are kept.
            InputError: a number is infinite or NaN.
        """
        arrays = {"mask_tokens": np.ascontiguousarray(features.mask_tokens)}
        if features.patch_tokens is not None:
            arrays["patch_tokens"] = np.ascontiguousarray(features.patch_tokens)
        self._check_arrays(shard, arrays)
        if not (self.directory / "cache.json").exists():
            write_atomically(
                self.directory / "cache.json", json.dumps(self.description, indent=2).encode()
            )
        written = (int(time.time()) - TIME_BACK_S) // 2 * 2  # FAT knows even seconds only
        header = ShardHeader(self._record_digests(shard, arrays), features.skipped, written)
        path = self.shard_path(shard)
        write_atomically(path, safetensors.numpy.save(arrays, header.to_metadata()))
        _set_time(path, header.written)

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Holds a shard, so that processes that fill one cache share the work. Yields False if
        another one holds it.

        A process that is killed lets go of it. A file system without locks yields True to all: the
        work is then done twice, and the shard that is renamed last stays.

        Raises:
            ArtifactError: the directory cannot be made.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot make {self.directory}: {why_not_written(error)}"
            ) from error
        path = self.directory / f".{self._digests[shard]}.lock"
        lock = filelock.FileLock(path, preserve_lock_file=True)  # no fallback to marker files
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            yield False
            return
        except (OSError, NotImplementedError):
            yield True
            return
        try:
            yield True
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        finally:
            lock.release()

    def unused_files(self) -> list[Path]:
        """What is of no use to this training set: shards of other images, and caches of earlier
        formats.

        Shards of a data set of the same name in another state, or in another part, count as unused,
        too.
        """
        own = {self.shard_path(shard) for shard in range(self.num_shards)}
        unused = [path for path in self.directory.glob("*.safetensors") if path not in own]
        for other in self.directory.parent.glob(
            f"{self.training_set.name}-{'[0-9a-f]' * 16}/cache.json"
        ):
            if other.parent != self.directory and _format_of(other) < FORMAT:
                unused += [path for path in other.parent.iterdir() if path.is_file()]
        return sorted(unused)

    def load(self) -> InMemoryFeatures:
        """All features, held in memory. Raises ArtifactError for a damaged shard."""
        features = InMemoryFeatures(self.training_set, self.shape)
        for shard in range(self.num_shards):
            images = self.shard_images(shard)
            first = self.training_set.offsets[images[0]]
            with self.reporting_damage(shard):
                arrays = self._read_verified(shard)
                tokens = torch.from_numpy(arrays["mask_tokens"])
                features.mask_tokens[first : first + len(tokens)] = tokens
                if features.patch_tokens is not None:
                    features.patch_tokens[images[0] : images[-1] + 1] = torch.from_numpy(
                        arrays["patch_tokens"]
                    )
        return features

    def open(self) -> OnDiskFeatures:
        """Features that are read from the disk, and verified, image by image."""
        return OnDiskFeatures(self)

    def header(self, shard: int) -> ShardHeader:
        """Raises ArtifactError for a damaged shard."""
        with self.reporting_damage(shard), self.open_shard(shard) as file:
            return ShardHeader.read(file)

    def open_shard(self, shard: int) -> Any:
        return safetensors.safe_open(self.shard_path(shard), framework="np")

    @contextlib.contextmanager
    def reporting_damage(self, shard: int) -> Iterator[None]:
        """Turns what a damaged shard raises into an ArtifactError, and deletes the shard, so that
        it is made anew.
        """
        path = self.shard_path(shard)
        try:
            yield
        except DAMAGED as error:
            if isinstance(error, OSError) and path.exists():  # too many open files, perhaps
                raise ArtifactError(
                    f"feature shard {path} cannot be read ({error}): run the same command again"
                ) from error
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise ArtifactError(
                f"feature shard {path} is damaged ({error}): run the same command again, it makes "
                "this shard anew and keeps the others"
            ) from error

    @cached_property
    def _digests(self) -> list[str]:
        return [
            self.training_set.images_digest(self._slice(shard)) for shard in range(self.num_shards)
        ]

    def _slice(self, shard: int) -> slice:
        last = shard + 1 == self.num_shards
        return slice(
            int(self.starts[shard]), len(self.training_set) if last else int(self.starts[shard + 1])
        )

    def _damage(self, shard: int, verify: bool) -> str | None:
        """What is wrong with a shard, None for nothing."""
        path = self.shard_path(shard)
        try:
            with self.open_shard(shard) as file:
                written = ShardHeader.read(file).written
            if verify or int(path.stat().st_mtime) != written:
                self._read_verified(shard)
                _set_time(path, written)
        except DAMAGED as error:
            return str(error)
        return None

    def _read_verified(self, shard: int) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a shard. Raises one of `DAMAGED` if they are not those that were
        written.
        """
        with self.open_shard(shard) as file:
            header = ShardHeader.read(file)
            arrays = {name: file.get_tensor(name) for name in self._array_names()}
        self._check_shapes(shard, arrays)
        if self._record_digests(shard, arrays) != header.records:
            raise ValueError("its checksum is wrong")
        return arrays

    def _array_names(self) -> tuple[str, ...]:
        return ("mask_tokens", "patch_tokens") if self.shape.patch_tokens else ("mask_tokens",)

    def _check_shapes(self, shard: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        images = self.shard_images(shard)
        expected = {
            "mask_tokens": (int(self.training_set.counts[images].sum()), *self.shape.mask_tokens)
        }
        if self.shape.patch_tokens:
            expected["patch_tokens"] = (len(images), *self.shape.patch_tokens)
        for name, shape in expected.items():
            if arrays[name].shape != shape or arrays[name].dtype != self.shape.dtype:
                raise ValueError(
                    f"{name} of shard {shard} must be {shape} {self.shape.dtype}, got "
                    f"{arrays[name].shape}"
                )

    def _check_arrays(self, shard: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self._check_shapes(shard, arrays)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise InputError(
                    f"{name} of shard {shard} of {self.training_set.name} have infinite or NaN "
                    "values"
                    + (
                        "; store them with features.dtype=float32"
                        if self.shape.dtype == "float16"
                        else ""
                    )
                )

    def _record_digests(
        self, shard: int, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[str, ...]:
        ends = np.cumsum(self.training_set.counts[self.shard_images(shard)])
        tokens, patches = np.split(arrays["mask_tokens"], ends[:-1]), arrays.get("patch_tokens")
        return tuple(
            record_digest(image_tokens, None if patches is None else patches[row])
            for row, image_tokens in enumerate(tokens)
        )


def record_digest(mask_tokens: npt.NDArray[Any], patch_tokens: npt.NDArray[Any] | None) -> str:
    """xxh3 of one image's mask tokens and, if there are any, patch tokens."""
    digest = xxhash.xxh3_64(np.ascontiguousarray(mask_tokens).data)
    if patch_tokens is not None:
        digest.update(np.ascontiguousarray(patch_tokens).data)
    return digest.hexdigest()


def check_space(caches: Sequence[FeatureCache], shards: Sequence[list[int]]) -> None:
    """Raises InputError if these shards, a list for each cache of one root, will not fit on the
    disk together.
    """
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
            f"the features of {names} need {in_units(needed)}, but {place} has {in_units(free)} "
            "free: free some space, or name another disk with features.cache_dir=DIR"
            + ("" if dtype == "float16" else ", or halve it with features.dtype=float16")
        )


def delete_unused(caches: Sequence[FeatureCache]) -> list[Path]:
    """Deletes what `FeatureCache.unused_files` lists and no cache of these uses.

    Returns:
        The files that were deleted.

    Raises:
        ArtifactError: a file cannot be deleted.
    """
    own = {cache.shard_path(shard) for cache in caches for shard in range(cache.num_shards)}
    unused = sorted({path for cache in caches for path in cache.unused_files()} - own)
    try:
        for path in unused:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot delete {error.filename}: {error.strerror}") from error
    return unused


def _set_time(path: Path, seconds: int) -> None:
    """Sets the time that tells an untouched shard. A file system that refuses costs verifying it at
    each start.
    """
    with contextlib.suppress(OSError):
        os.utime(path, (seconds, seconds))


def _format_of(description: Path) -> int:
    """The format of the cache that a cache.json describes; `FORMAT` where that cannot be told."""
    try:
        return int(json.loads(description.read_bytes())["format"])
    except (OSError, ValueError, KeyError, TypeError):
        return FORMAT


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
        self.patch_tokens = (
            None if patches is None else torch.empty((len(training_set), *patches), dtype=dtype)
        )

    def gather(self, images: IntArray) -> tuple[Tensor, Tensor | None]:
        """Mask tokens (r, T, C) of all regions of some images, image after image, and patch tokens
        (B, L, D).
        """
        regions = torch.from_numpy(self._training_set.region_indices(images))
        patches = self.patch_tokens
        return self.mask_tokens[regions], None if patches is None else patches[
            torch.from_numpy(images)
        ]


class OnDiskFeatures:
    """As `InMemoryFeatures`, read from the shards when asked, each record verified."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def gather(self, images: IntArray) -> tuple[Tensor, Tensor | None]:
        """As `InMemoryFeatures.gather`. Raises ArtifactError for a damaged record; it names the
        shard.
        """
        records = [self._read(int(image)) for image in images]
        tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in records]))
        maps = [patches for _, patches in records if patches is not None]
        return tokens, torch.from_numpy(np.stack(maps)) if maps else None

    def _open_shard(self, shard: int) -> tuple[Any, tuple[str, ...]]:
        file = self._cache.open_shard(shard)
        return file, ShardHeader.read(file).records

    def _read(self, image: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        offsets = self._cache.training_set.offsets
        shard, row = self._cache.shard_of(image)
        start, stop = offsets[image : image + 2] - offsets[image - row]
        with self._cache.reporting_damage(shard):
            file, digests = self._shard(shard)
            tokens = file.get_slice("mask_tokens")[int(start) : int(stop)]
            patches = (
                file.get_slice("patch_tokens")[row] if self._cache.shape.patch_tokens else None
            )
            if record_digest(tokens, patches) != digests[row]:
                raise ValueError(
                    f"the record of {self._cache.training_set.file_names[image]} has a wrong "
                    "checksum"
                )
        return tokens, patches


class SelectedFeatures:
    """The features of some images of another store.

    Args:
        images: indices there; an index here is a position in this list.
    """

    def __init__(self, store: InMemoryFeatures | OnDiskFeatures, images: IntArray) -> None:
        self._store, self._images = store, images

    def gather(self, images: IntArray) -> tuple[Tensor, Tensor | None]:
        """As `InMemoryFeatures.gather`."""
        return self._store.gather(self._images[images])
