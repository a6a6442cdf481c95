"""Pretraining data in memory-mapped arrays: scenes with masks for SAM and CLIP, portraits for CLIP's first stage."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from regionspot.masks import mask_to_box
from regionspot.mini.architecture import CLIP_IMAGE_SIZE, PATCH_SIZE, SAM_IMAGE_SIZE
from regionspot.mini.render import render_scene
from regionspot.mini.world import UNIFORM_WEIGHTS, WORLD_VERSION, sample_portrait, sample_scene
from regionspot.progress import Progress
from regionspot.transforms import ClipTransform, SamTransform, model_inputs

MAX_TOYS = 7
MASK_SIZE = SAM_IMAGE_SIZE // 4
GRID = CLIP_IMAGE_SIZE // PATCH_SIZE
SHARD = 250

_Fields = dict[str, tuple[tuple[int, ...], type[np.generic]]]
_Fill = Callable[[Path, int, int, int], None]


@dataclass(frozen=True)
class ScenePool:
    """`count` scenes, categories drawn alike. Toys beyond a scene's own have category -1 and empty masks.

    Attributes:
        sam_images: (count, 256, 256, 3) uint8, longest side 256, zero-padded right and bottom.
        sam_sizes: (count, 2) int16, the valid height and width of each.
        clip_images: (count, 128, 128, 3) uint8.
        categories: (count, 7) int16.
        boxes: (count, 7, 4) float32 xyxy in the SAM frame.
        masks: (count, 7, 64, 64) uint8, coverage in 255ths of SAM's low-resolution mask cells.
        covers: (count, 7, 8, 8) uint8, coverage in 255ths of CLIP's patches.
    """

    sam_images: np.ndarray
    sam_sizes: np.ndarray
    clip_images: np.ndarray
    categories: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    covers: np.ndarray


_SCENE_FIELDS: _Fields = {
    "sam_images": ((SAM_IMAGE_SIZE, SAM_IMAGE_SIZE, 3), np.uint8),
    "sam_sizes": ((2,), np.int16),
    "clip_images": ((CLIP_IMAGE_SIZE, CLIP_IMAGE_SIZE, 3), np.uint8),
    "categories": ((MAX_TOYS,), np.int16),
    "boxes": ((MAX_TOYS, 4), np.float32),
    "masks": ((MAX_TOYS, MASK_SIZE, MASK_SIZE), np.uint8),
    "covers": ((MAX_TOYS, GRID, GRID), np.uint8),
}


def scene_pool(directory: Path, count: int, seed: int, workers: int = 2) -> ScenePool:
    """Open the pool of `count` scenes in `directory`, rendering it first if it is not there."""
    directory = directory / f"scenes-{WORLD_VERSION}-{count}-{seed}"
    return ScenePool(**_open_or_render(directory, _SCENE_FIELDS, count, seed, _fill_scenes, workers))


def portrait_pool(directory: Path, count: int, seed: int, side: int, workers: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Open or render `count` pictures of one toy: images (count, side, side, 3) uint8, categories (count,) int16."""
    fields: _Fields = {"images": ((side, side, 3), np.uint8), "categories": ((), np.int16)}
    directory = directory / f"portraits-{WORLD_VERSION}-{count}-{side}-{seed}"
    arrays = _open_or_render(directory, fields, count, seed, _fill_portraits, workers)
    return arrays["images"], arrays["categories"]


def _open_or_render(
    directory: Path, fields: _Fields, count: int, seed: int, fill: _Fill, workers: int
) -> dict[str, np.ndarray]:
    done = directory / "done.json"
    if not done.exists():
        directory.mkdir(parents=True, exist_ok=True)
        for name, (shape, dtype) in fields.items():
            np.lib.format.open_memmap(directory / f"{name}.npy", "w+", dtype, (count, *shape)).flush()
        starts = range(0, count, SHARD)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context) as pool, Progress(directory.name, count, "pictures") as progress:
            jobs = [pool.submit(fill, directory, start, min(count, start + SHARD), seed) for start in starts]
            for finished, job in enumerate(jobs, start=1):
                job.result()
                progress.update(min(count, finished * SHARD))
        done.write_text(json.dumps({"count": count, "seed": seed}))
    return {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in fields}


def _fill_scenes(directory: Path, start: int, stop: int, seed: int) -> None:
    out = {name: np.load(directory / f"{name}.npy", mmap_mode="r+") for name in _SCENE_FIELDS}
    sam, clip = SamTransform(SAM_IMAGE_SIZE), ClipTransform(CLIP_IMAGE_SIZE)
    for index in range(start, stop):
        image, toys = render_scene(sample_scene(np.random.default_rng([seed, 0, index]), UNIFORM_WEIGHTS))
        inputs = model_inputs(image, sam, clip)
        out["sam_images"][index], out["sam_sizes"][index], out["clip_images"][index] = inputs
        out["categories"][index] = -1
        for slot, (category, mask) in enumerate(toys[:MAX_TOYS]):
            grey = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)  # (H, W, 3): the transforms take pictures
            framed, _ = sam.apply_image(grey)
            corners = sam.apply_points(mask_to_box(mask).reshape(2, 2), *mask.shape)
            out["categories"][index, slot] = category
            out["boxes"][index, slot] = corners.reshape(4)
            out["masks"][index, slot] = Image.fromarray(framed[..., 0]).reduce(4)
            out["covers"][index, slot] = Image.fromarray(grey[..., 0]).resize((GRID, GRID), Image.Resampling.BOX)


def _fill_portraits(directory: Path, start: int, stop: int, seed: int) -> None:
    images = np.load(directory / "images.npy", mmap_mode="r+")
    categories = np.load(directory / "categories.npy", mmap_mode="r+")
    for index in range(start, stop):
        scene = sample_portrait(np.random.default_rng([seed, 1, index]), UNIFORM_WEIGHTS, images.shape[1])
        images[index] = render_scene(scene)[0]
        categories[index] = scene.toys[0].category
