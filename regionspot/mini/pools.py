"""Pretraining data in memory-mapped arrays: scenes with masks for SAM, pictures with what they show
for CLIP.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from regionspot.masks import mask_to_box
from regionspot.mini.architecture import CLIP_IMAGE_SIZE, SAM_IMAGE_SIZE
from regionspot.mini.render import render_scene
from regionspot.mini.world import (
    UNIFORM_WEIGHTS,
    WORLD_VERSION,
    Scene,
    sample_crowd,
    sample_portrait,
    sample_scene,
)
from regionspot.progress import Progress
from regionspot.transforms import ClipTransform, SamTransform

MAX_TOYS = 9
MASK_SIZE = SAM_IMAGE_SIZE // 4
PORTRAIT_SIDES = (64, 128)  # pixels, from and to
CROWDS = 0.15  # of SAM's pictures
SHARD = 250

_Fields = dict[str, tuple[tuple[int, ...], type[np.generic]]]
_Fill = Callable[[Path, int, int, int], None]


@dataclass(frozen=True)
class ScenePool:
    """`count` scenes for SAM, categories drawn alike, some of them crowds.

    Attributes:
        images: (count, 256, 256, 3) uint8, longest side 256, zero-padded right and bottom.
        sizes: (count, 2) int16, the valid height and width of each.
        toys: (count,) int16, how many of the following are a scene's own; of a crowd nine at
            random.
        boxes: (count, 9, 4) float32 xyxy in the SAM frame.
        masks: (count, 9, 64, 64) uint8, coverage in 255ths of SAM's low-resolution mask cells.
    """

    images: np.ndarray
    sizes: np.ndarray
    toys: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class PicturePool:
    """`count` pictures for CLIP, categories drawn alike.

    Attributes:
        images: (count, S, S, 3) uint8; S is 192 for scenes, 128 for portraits.
        categories: (count, 9) int16, what each shows, -1 beyond.
    """

    images: np.ndarray
    categories: np.ndarray


_SCENE_FIELDS: _Fields = {
    "images": ((SAM_IMAGE_SIZE, SAM_IMAGE_SIZE, 3), np.uint8),
    "sizes": ((2,), np.int16),
    "toys": ((), np.int16),
    "boxes": ((MAX_TOYS, 4), np.float32),
    "masks": ((MAX_TOYS, MASK_SIZE, MASK_SIZE), np.uint8),
}


def _picture_fields(side: int) -> _Fields:
    return {"images": ((side, side, 3), np.uint8), "categories": ((MAX_TOYS,), np.int16)}


def sam_scenes(directory: Path, count: int, seed: int, workers: int = 2) -> ScenePool:
    """Open the pool of `count` scenes in `directory`, rendering it first if it is not there."""
    directory = directory / f"sam-scenes-{WORLD_VERSION}-{count}-{seed}"
    return ScenePool(
        **_open_or_render(directory, _SCENE_FIELDS, count, seed, _fill_sam_scenes, workers)
    )


def clip_scenes(directory: Path, count: int, seed: int, workers: int = 2) -> PicturePool:
    """Open or render `count` scenes of one toy or more."""
    directory = directory / f"clip-scenes-{WORLD_VERSION}-{count}-{CLIP_IMAGE_SIZE}-{seed}"
    fields = _picture_fields(CLIP_IMAGE_SIZE)
    return PicturePool(
        **_open_or_render(directory, fields, count, seed, _fill_clip_scenes, workers)
    )


def clip_portraits(directory: Path, count: int, seed: int, workers: int = 2) -> PicturePool:
    """Open or render `count` pictures that one toy fills, of 64 to 128 px: the size of crops from
    scenes.
    """
    directory = directory / f"clip-portraits-{WORLD_VERSION}-{count}-{PORTRAIT_SIDES[1]}-{seed}"
    fields = _picture_fields(PORTRAIT_SIDES[1])
    return PicturePool(
        **_open_or_render(directory, fields, count, seed, _fill_clip_portraits, workers)
    )


def _open_or_render(
    directory: Path, fields: _Fields, count: int, seed: int, fill: _Fill, workers: int
) -> dict[str, np.ndarray]:
    done = directory / "done.json"
    if not done.exists():
        directory.mkdir(parents=True, exist_ok=True)
        for name, (shape, dtype) in fields.items():
            np.lib.format.open_memmap(
                directory / f"{name}.npy", "w+", dtype, (count, *shape)
            ).flush()
        starts = range(0, count, SHARD)
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(workers, context) as pool,
            Progress(directory.name, count, "pictures") as progress,
        ):
            jobs = [
                pool.submit(fill, directory, start, min(count, start + SHARD), seed)
                for start in starts
            ]
            for finished, job in enumerate(jobs, start=1):
                job.result()
                progress.update(min(count, finished * SHARD))
        done.write_text(json.dumps({"count": count, "seed": seed}))
    return {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in fields}


def _fill_sam_scenes(directory: Path, start: int, stop: int, seed: int) -> None:
    out = ScenePool(**_opened(directory, _SCENE_FIELDS))
    transform = SamTransform(SAM_IMAGE_SIZE)
    for index in range(start, stop):
        rng = np.random.default_rng([seed, 0, index])
        sample = sample_crowd if rng.random() < CROWDS else sample_scene
        image, toys = render_scene(sample(rng, UNIFORM_WEIGHTS))
        out.images[index], out.sizes[index] = transform.apply_image(image)
        kept = sorted(rng.permutation(len(toys))[:MAX_TOYS])
        out.toys[index] = len(kept)
        for slot, mask in enumerate(toys[k][1] for k in kept):
            grey = np.repeat(
                mask[..., None] * np.uint8(255), 3, axis=2
            )  # (H, W, 3): the transform takes pictures
            corners = transform.apply_points(mask_to_box(mask).reshape(2, 2), *mask.shape)
            out.boxes[index, slot] = corners.reshape(4)
            out.masks[index, slot] = Image.fromarray(transform.apply_image(grey)[0][..., 0]).reduce(
                4
            )


def _fill_clip_scenes(directory: Path, start: int, stop: int, seed: int) -> None:
    sample = partial(sample_scene, weights=UNIFORM_WEIGHTS, num_toys=(1, 1, 2, 3, 4, 5, 6))
    _fill_pictures(directory, start, stop, seed, CLIP_IMAGE_SIZE, sample)


def _fill_clip_portraits(directory: Path, start: int, stop: int, seed: int) -> None:
    low, high = PORTRAIT_SIDES
    sample = partial(sample_portrait, weights=UNIFORM_WEIGHTS)
    _fill_pictures(
        directory,
        start,
        stop,
        seed,
        high,
        lambda rng: sample(rng, side=int(rng.integers(low, high + 1))),
    )


def _fill_pictures(
    directory: Path,
    start: int,
    stop: int,
    seed: int,
    side: int,
    sample: Callable[[np.random.Generator], Scene],
) -> None:
    out = PicturePool(**_opened(directory, _picture_fields(side)))
    transform = ClipTransform(side)
    for index in range(start, stop):
        image, toys = render_scene(sample(np.random.default_rng([seed, 1, index])))
        out.images[index] = transform.apply_image(image)
        out.categories[index] = -1
        out.categories[index, : min(MAX_TOYS, len(toys))] = [
            category for category, _ in toys[:MAX_TOYS]
        ]


def _opened(directory: Path, fields: _Fields) -> dict[str, np.ndarray]:
    return {name: np.load(directory / f"{name}.npy", mmap_mode="r+") for name in fields}
