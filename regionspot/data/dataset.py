"""What the head is trained on: an annotation file's usable regions, and which images make the batch
of which step.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from regionspot.data.coco_json import Annotation, Category, CocoDataset, ImageRecord
from regionspot.data.formats import load_dataset
from regionspot.errors import InputError, first_few
from regionspot.vocabulary import clean_coco_name

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

MISSING = -1
"""Stands for the size of a picture that is not there."""

STAT_THREADS, STAT_CHUNK = 16, 512
"""Sizes of files are looked up by this many threads, for the sake of network file systems."""


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The I images of an annotation file that have regions to learn from, and those R regions,
    image after image.

    Attributes:
        name: what logs call it.
        class_names: the V classes that `class_ids` index, each name once.
        paths, file_names: of the I images.
        file_bytes: (I,) size of each picture's file, `MISSING` where there is none.
        sizes: (I, 2) height and width in pixels, as the annotation file says.
        counts: (I,) regions of each image, 1 or more.
        boxes: (R, 4) xyxy in original-image pixels, clipped to the image.
        class_ids: (R,) index into `class_names`.
        left_out: reason -> how many images or regions of the file are not in here for it.
        notes: sentences for people about how the file was read.
    """

    name: str
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    file_names: tuple[str, ...]
    file_bytes: IntArray
    sizes: IntArray
    counts: IntArray
    boxes: FloatArray
    class_ids: IntArray
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_regions(self) -> int:
        return len(self.class_ids)

    @cached_property
    def offsets(self) -> IntArray:
        """(I + 1,): image i's regions are those from offsets[i] up to offsets[i + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    def region_indices(self, images: IntArray) -> IntArray:
        """Indices into `boxes` and `class_ids` of all regions of some images, image after image."""
        counts = self.counts[images]
        ends = np.cumsum(counts)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        return np.repeat(self.offsets[images], counts) + within

    def select(self, images: IntArray) -> TrainingSet:
        """The training set of some of the images, in the given order."""
        regions = self.region_indices(images)
        return replace(
            self,
            paths=tuple(self.paths[image] for image in images),
            file_names=tuple(self.file_names[image] for image in images),
            file_bytes=self.file_bytes[images],
            sizes=self.sizes[images],
            counts=self.counts[images],
            boxes=self.boxes[regions],
            class_ids=self.class_ids[regions],
        )

    def images_digest(self, images: slice = slice(None)) -> str:
        """Changes with these images (names and sizes in bytes) and their boxes: what features
        depend on.
        """
        digest = xxhash.xxh3_128()
        for file_name, num_bytes in zip(
            self.file_names[images], self.file_bytes[images].tolist(), strict=True
        ):
            digest.update(f"{file_name}\0{num_bytes}\0".encode("utf-8", "surrogatepass"))
        counts = self.counts[images]
        first = int(self.offsets[images][0]) if len(counts) else 0
        for array in (self.sizes[images], counts, self.boxes[first : first + int(counts.sum())]):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @cached_property
    def digest(self) -> str:
        """Changes with the images, their boxes, the boxes' classes and the classes' names."""
        text = "\0".join((self.images_digest(), *self.class_names))
        digest = xxhash.xxh3_128(text.encode("utf-8", "surrogatepass"))
        digest.update(self.class_ids.tobytes())
        return digest.hexdigest()


def load_training_set(
    name: str,
    annotations: str | Path,
    image_root: str | Path | None = None,
    *,
    exclude: str = "none",
    clean_names: Literal["none", "coco"] = "none",
    missing_images: Literal["stop", "keep"] = "stop",
) -> TrainingSet:
    """Reads an annotation file for training.

    Left out are the regions of excluded classes (which are not even negatives), crowds, boxes
    without area inside the image, and images without any region left. Categories that share a name
    are one class: the words are what the head is trained on, so a region of either category is a
    positive of the one word.

    Args:
        exclude: "none", "novel" for the categories that the file marks `"novel": true`, or a text
            file with the name of a class on each line.
        clean_names: "coco" cuts COCO's suffixes `-other`, `-merged` and `-stuff` off the names.
        missing_images: "keep" keeps the records of pictures that are not there.

    Raises:
        InputError: the file is unusable (see `load_dataset`), or nothing in it can be learnt from.
    """
    dataset = load_dataset(annotations, image_root, check_images=False)
    dataset.check_images(missing_allowed=missing_images == "keep")
    classes = _Classes.of(dataset, exclude, clean_names)
    usable = _UsableRegions()
    for image in dataset.images:
        usable.add(image, dataset.annotations_by_image[image.id], classes.index)
    if not usable.images:
        raise InputError(
            _nothing_to_learn(annotations, dataset.num_annotations, usable.left_out, exclude)
        )
    paths = tuple(dataset.image_path(image) for image in usable.images)
    return TrainingSet(
        name=name,
        class_names=classes.names,
        paths=paths,
        file_names=tuple(image.file_name for image in usable.images),
        file_bytes=_file_bytes(paths),
        sizes=np.array([(image.height, image.width) for image in usable.images], np.int64),
        counts=np.array(usable.counts, np.int64),
        boxes=np.concatenate(usable.boxes),
        class_ids=np.array(usable.class_ids, np.int64),
        left_out={reason: count for reason, count in usable.left_out.items() if count},
        notes=classes.notes,
    )


@dataclass(frozen=True)
class _Classes:
    """The classes of a training set: their names, and the class of each category id that is not
    excluded.
    """

    names: tuple[str, ...]
    index: Mapping[Any, int]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: CocoDataset, exclude: str, clean_names: str) -> _Classes:
        kept, notes = _without_excluded(dataset, exclude)
        words = [clean_coco_name(c.name) if clean_names == "coco" else c.name for c in kept]
        number = {word: index for index, word in enumerate(dict.fromkeys(words))}
        if shared := [word for word, count in Counter(words).items() if count > 1]:
            names = first_few(map(repr, shared))
            notes.append(
                f"{len(shared)} names stand for several categories each, and are one class each: "
                f"{names}"
            )
        index = {category.id: number[word] for category, word in zip(kept, words, strict=True)}
        return cls(tuple(number), index, tuple(notes))


def _without_excluded(dataset: CocoDataset, exclude: str) -> tuple[list[Category], list[str]]:
    """The categories to train on, and notes."""
    categories, notes = list(dataset.categories), []
    novel = sum(category.novel for category in categories)
    if exclude == "none":
        kept = categories
        if novel:
            notes.append(
                f"{novel} categories marked novel are trained on like all others (exclude: novel "
                "drops them)"
            )
    elif exclude == "novel":
        if not novel:
            raise InputError(
                f'{dataset.path} marks no category "novel": true, so exclude: novel would leave '
                "out none: name a text "
                "file of class names, or set exclude: none"
            )
        kept = [category for category in categories if not category.novel]
    else:
        listed = _listed_names(Path(exclude))
        kept = [category for category in categories if category.name not in listed]
        if len(kept) == len(categories):
            raise InputError(
                f"none of the names in {exclude} (exclude) is a class of {dataset.path}: check "
                "both files"
            )
        if unknown := sorted(listed - {category.name for category in categories}):
            notes.append(
                f"{exclude} lists {len(unknown)} names that are no class here: {first_few(unknown)}"
            )
    if len(kept) < len(categories):
        notes.append(
            f"{len(categories) - len(kept)} of {len(categories)} categories are excluded (exclude: "
            f"{exclude})"
        )
    if not kept:
        excluded = f"all {len(categories)} categories are excluded (exclude: {exclude})"
        why = excluded if categories else "it lists no category"
        raise InputError(f"{dataset.path} has no class to learn: {why}")
    return kept, notes


def _listed_names(path: Path) -> set[str]:
    """The lines of a text file. Raises InputError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(
            f"cannot read the list of excluded classes {path}: {reason}. exclude is none, novel, "
            "or a UTF-8 text file with a class name on each line"
        ) from error
    return {line.strip() for line in lines if line.strip()}


class _UsableRegions:
    """Collects images and regions to learn from, and counts what is left out by reason."""

    NO_REGION = "images without a usable region"
    NO_CLASS = "regions of excluded classes"
    CROWD = "crowd regions (iscrowd)"
    NO_AREA = "boxes without area in the image"

    def __init__(self) -> None:
        self.images: list[ImageRecord] = []
        self.counts: list[int] = []
        self.boxes: list[FloatArray] = []
        self.class_ids: list[int] = []
        self.left_out = dict.fromkeys((self.NO_REGION, self.NO_CLASS, self.CROWD, self.NO_AREA), 0)

    def add(
        self, image: ImageRecord, annotations: Sequence[Annotation], class_of: Mapping[Any, int]
    ) -> None:
        known = [annotation for annotation in annotations if annotation.category_id in class_of]
        single = [annotation for annotation in known if not annotation.iscrowd]
        boxes = np.array([annotation.box for annotation in single], np.float32).reshape(-1, 4)
        boxes = np.clip(boxes, 0, [image.width, image.height, image.width, image.height]).astype(
            np.float32
        )
        usable = np.all(boxes[:, :2] < boxes[:, 2:], axis=1)
        self.left_out[self.NO_CLASS] += len(annotations) - len(known)
        self.left_out[self.CROWD] += len(known) - len(single)
        self.left_out[self.NO_AREA] += int((~usable).sum())
        if not usable.any():
            self.left_out[self.NO_REGION] += 1
            return
        self.images.append(image)
        self.counts.append(int(usable.sum()))
        self.boxes.append(boxes[usable])
        self.class_ids += [
            class_of[a.category_id] for a, keep in zip(single, usable, strict=True) if keep
        ]


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """ "left out 3 crowd regions (iscrowd), 2 images without a usable region", or "nothing left
    out".
    """
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    return f"left out {reasons}" if reasons else "nothing left out"


def _nothing_to_learn(
    annotations: str | Path, total: int, left_out: Mapping[str, int], exclude: str
) -> str:
    reasons = {
        reason: count for reason, count in left_out.items() if reason != _UsableRegions.NO_REGION
    }
    why = (
        f"of its {total} annotations, {describe_left_out(reasons)}"
        if total
        else "it has no annotations"
    )
    excluded = f" (exclude: {exclude})" if reasons[_UsableRegions.NO_CLASS] else ""
    return f"{annotations} has no region to learn from: {why}{excluded}"


def _file_bytes(paths: Sequence[Path]) -> IntArray:
    """(I,) sizes of files, by one system call each."""
    parts = [paths[start : start + STAT_CHUNK] for start in range(0, len(paths), STAT_CHUNK)]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return np.concatenate(list(pool.map(_sizes_of, parts)))


def _sizes_of(paths: Sequence[Path]) -> IntArray:
    return np.array([_size_of(path) for path in paths], np.int64)


def _size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return MISSING


class BatchSchedule:
    """Which data set and which of its images make the batch of a step: a pure function of (seed,
    step).

    Nothing is drawn in sequence, so a resumed run needs the step alone. A batch is of one data set,
    since each has its own vocabulary. Of every sum(ratios) steps exactly ratios[d] are data set
    d's, in an order drawn anew each time; each data set goes through all of its images, in an order
    drawn anew for each epoch, before any comes again.

    Args:
        sizes: images of each data set.
        ratios: how often each has its turn.
    """

    def __init__(self, sizes: list[int], ratios: list[int], batch_size: int, seed: int) -> None:
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self._turns = np.repeat(np.arange(len(ratios)), ratios)
        self._ratios = ratios
        # data set -> the epoch that was asked for last
        self._epochs: dict[int, tuple[int, IntArray]] = {}

    def batch(self, step: int) -> tuple[int, IntArray]:
        """The data set of a step, counted from 0, and the (B,) indices of its images."""
        cycle, turn = divmod(step, len(self._turns))
        order = np.random.default_rng([self.seed, 0, cycle]).permutation(self._turns)
        dataset = int(order[turn])
        earlier = cycle * self._ratios[dataset] + int((order[:turn] == dataset).sum())
        return dataset, self._images(dataset, earlier * self.batch_size)

    def _images(self, dataset: int, start: int) -> IntArray:
        """`batch_size` images from the endless row of epochs, from position `start`."""
        size, images = self.sizes[dataset], []
        for position in range(start, start + self.batch_size):
            epoch, index = divmod(position, size)
            images.append(self._epoch(dataset, epoch)[index])
        return np.array(images, np.int64)

    def _epoch(self, dataset: int, epoch: int) -> IntArray:
        last = self._epochs.get(dataset)
        if last is None or last[0] != epoch:
            order = np.random.default_rng([self.seed, 1, dataset, epoch]).permutation(
                self.sizes[dataset]
            )
            last = self._epochs[dataset] = (epoch, order)
        return last[1]


def step_seed(seed: int, step: int) -> int:
    """The 63-bit seed of everything random inside a step, such as dropout."""
    return int(np.random.SeedSequence([seed, 2, step]).generate_state(1, np.uint64)[0] >> 1)
