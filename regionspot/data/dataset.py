"""What the head is trained on: an annotation file's usable regions, and which images make the batch of which step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.structures import check_class_names

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The I images of an annotation file that have regions to learn from, and those R regions, image after image.

    Attributes:
        name: what logs call it.
        class_names: the V classes that `class_ids` index.
        paths, file_names: of the I images.
        sizes: (I, 2) height and width in pixels, as the annotation file says.
        counts: (I,) regions of each image, 1 or more.
        boxes: (R, 4) xyxy in original-image pixels, clipped to the image.
        class_ids: (R,) index into `class_names`.
        dropped_images, dropped_regions: how many of the file's were not usable.
    """

    name: str
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    file_names: tuple[str, ...]
    sizes: IntArray
    counts: IntArray
    boxes: FloatArray
    class_ids: IntArray
    dropped_images: int = 0
    dropped_regions: int = 0

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

    @cached_property
    def image_digest(self) -> str:
        """Changes with the images (names and sizes in bytes) and their boxes: what features depend on."""
        digest = xxhash.xxh3_128()
        for path, file_name in zip(self.paths, self.file_names, strict=True):
            digest.update(f"{file_name}\0{path.stat().st_size}\0".encode())
        for array in (self.sizes, self.counts, self.boxes):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @cached_property
    def digest(self) -> str:
        """As `image_digest`, and it changes with the boxes' classes and the classes' names."""
        digest = xxhash.xxh3_128("\0".join((self.image_digest, *self.class_names)).encode())
        digest.update(self.class_ids.tobytes())
        return digest.hexdigest()


def load_training_set(name: str, annotations: str | Path, image_root: str | Path | None = None) -> TrainingSet:
    """Read a COCO or LVIS annotation file for training.

    Left out: categories marked `"novel": true` and their regions (they are not even negatives), crowds, boxes of no
    area inside the image, and images without any region left.

    Raises:
        InputError: the file is unusable (see `CocoDataset.load`), two of its classes share a name, or nothing in it
            can be learnt from.
    """
    dataset = CocoDataset.load(annotations, image_root)
    known = [category for category in dataset.categories if not category.novel]
    class_names = tuple(category.name for category in known)
    _check_class_names(class_names, annotations)
    class_of = {category.id: index for index, category in enumerate(known)}
    images, counts, boxes, class_ids = [], [], [], []
    for image in dataset.images:
        wanted = [a for a in dataset.annotations_by_image[image.id] if not a.iscrowd and a.category_id in class_of]
        clipped = np.array([a.box for a in wanted], np.float32).reshape(-1, 4)
        clipped = np.clip(clipped, 0, [image.width, image.height, image.width, image.height])
        usable = np.all(clipped[:, :2] < clipped[:, 2:], axis=1)
        if usable.any():
            images.append(image)
            counts.append(int(usable.sum()))
            boxes.append(clipped[usable].astype(np.float32))
            class_ids += [class_of[a.category_id] for a, keep in zip(wanted, usable, strict=True) if keep]
    if not images:
        raise InputError(
            f"{annotations} has no region to learn from: no box inside an image of a class that is not novel"
        )
    return TrainingSet(
        name=name,
        class_names=class_names,
        paths=tuple(dataset.image_path(image) for image in images),
        file_names=tuple(image.file_name for image in images),
        sizes=np.array([(image.height, image.width) for image in images], np.int64),
        counts=np.array(counts, np.int64),
        boxes=np.concatenate(boxes),
        class_ids=np.array(class_ids, np.int64),
        dropped_images=len(dataset.images) - len(images),
        dropped_regions=dataset.num_annotations - len(class_ids),
    )


def _check_class_names(names: tuple[str, ...], annotations: str | Path) -> None:
    try:
        check_class_names(names)
    except InputError as error:
        raise InputError(f"the categories of {annotations}, but for novel ones: {error}") from error


class BatchSchedule:
    """Which data set and which of its images make the batch of a step: a pure function of (seed, step).

    Nothing is drawn in sequence, so a resumed run needs the step alone. A batch is of one data set, since each has its
    own vocabulary. Of every sum(ratios) steps exactly ratios[d] are data set d's, in an order drawn anew each time;
    each data set goes through all of its images, in an order drawn anew for each epoch, before any comes again.

    Args:
        sizes: images of each data set.
        ratios: how often each has its turn.
    """

    def __init__(self, sizes: list[int], ratios: list[int], batch_size: int, seed: int) -> None:
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self._turns = np.repeat(np.arange(len(ratios)), ratios)
        self._ratios = ratios
        self._epochs: dict[int, tuple[int, IntArray]] = {}  # data set -> the epoch that was asked for last

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
            order = np.random.default_rng([self.seed, 1, dataset, epoch]).permutation(self.sizes[dataset])
            last = self._epochs[dataset] = (epoch, order)
        return last[1]


def step_seed(seed: int, step: int) -> int:
    """The 63-bit seed of everything random inside a step, such as dropout."""
    return int(np.random.SeedSequence([seed, 2, step]).generate_state(1, np.uint64)[0] >> 1)
