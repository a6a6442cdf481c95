"""How fast a head trains: from cached features, with CLIP's maps computed at each step, and with
nothing cached.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.memory import PeakMemory
from regionspot.config import AugmentationConfig, DatasetConfig, FeatureConfig, TrainConfig
from regionspot.data.dataset import BatchSchedule, TrainingSet
from regionspot.data.extraction import FeatureExtractor, fill_caches
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.sam import SamBackbone
from regionspot.training.loop import prepare_batches
from regionspot.training.setup import Setup
from regionspot.training.trainer import Trainer

logger = logging.getLogger(__name__)

WARM_UP = 2
CACHED = "steps, features cached"
ANEW = "steps, CLIP's maps anew"
UNCACHED = "steps, nothing cached"
INCLUDES = {
    "extraction": "reading pictures, both encoders, SAM's tokens of all boxes, writing the shards",
    CACHED: "reading cached features, the head forwards and backwards, the optimiser",
    ANEW: "the recipe of the paper: SAM's tokens cached, each picture read, cropped, flipped and "
    "encoded by CLIP",
    UNCACHED: "each picture read and encoded by SAM and CLIP, SAM's tokens decoded, then the step",
}


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        config: of the run; its caches and the lengths are set here.
        runtimes: (runtime, precision or None) that features are extracted with besides PyTorch,
            from `artifacts`.
        steps: of each measurement.
    """

    config: TrainConfig
    backbones: tuple[SamBackbone, ClipBackbone]
    annotations: Path
    images: str | None
    steps: int
    artifacts: str | None = None
    runtimes: Sequence[tuple[str, str]] = ()


def measure(request: Request) -> dict[str, Any]:
    """The report. Raises RegionSpotError where the data or the artefacts cannot be used."""
    with tempfile.TemporaryDirectory() as name:
        rows = list(_rows(request, Path(name)))
    base = next(row["images_per_s"] for row in rows if row["what"] == UNCACHED)
    for row in rows:
        if row["what"] != "extraction":
            row["speedup"] = row["images_per_s"] / base
    config = request.config
    return {
        "benchmark": "train",
        "rows": rows,
        "conditions": conditions(
            model=config.model.preset,
            data=request.annotations.name,
            batch_size=config.batch_size,
            steps=request.steps,
            warm_up=WARM_UP,
            device=config.device,
            includes=INCLUDES,
        ),
    }


def _rows(request: Request, folder: Path) -> Iterator[dict[str, Any]]:
    for runtime, precision in (("torch", "fp32"), *request.runtimes):
        config = _config(request, folder / f"{runtime}-{precision}", runtime, precision)
        yield _extraction(Setup.from_config(config, request.backbones), f"{runtime} {precision}")
    cached = _config(request, folder / "torch-fp32")
    yield from _steps(CACHED, cached, request)
    yield from _steps(ANEW, replace(cached, augmentation=AugmentationConfig()), request)
    yield from _steps(UNCACHED, cached, request, uncached=True)


def _config(
    request: Request, cache: Path, runtime: str = "torch", precision: str = "fp32"
) -> TrainConfig:
    features = replace(
        request.config.features,
        cache_dir=str(cache),
        runtime="torch",
        artifacts=None,
        precision=None,
    )
    if runtime != "torch":
        options = {"runtime": runtime, "artifacts": request.artifacts, "precision": precision}
        features = FeatureConfig(**{**vars(features), **options})
    data = DatasetConfig("data", str(request.annotations), request.images)
    return replace(
        request.config, datasets=(data,), features=features, steps=WARM_UP + request.steps
    )


def _extraction(setup: Setup, runtime: str) -> dict[str, Any]:
    features, (training_set,) = setup.config.features, setup.sets
    logger.info(f"measuring extraction by {runtime}")
    with setup.extractor.pipeline:
        # opens the graphs
        _extract(setup.extractor, training_set, range(min(2, len(training_set))))
        memory = PeakMemory()
        memory.start()
        began = time.perf_counter()
        fill_caches(setup.caches, setup.extractor, features.batch_size, features.workers)
        seconds = time.perf_counter() - began
    row = {
        "what": "extraction",
        "runtime": runtime,
        "batch": features.batch_size,
        "peak_mb": memory.peak_mb(),
    }
    return row | _rates(len(training_set), training_set.num_regions, seconds)


def _steps(
    what: str, config: TrainConfig, request: Request, uncached: bool = False
) -> Iterator[dict[str, Any]]:
    """Steps of the trainer; `uncached` extracts the features of each step's pictures again before
    it.
    """
    logger.info(f"measuring {what}")
    setup = Setup.from_config(config, request.backbones)
    (training_set,) = setup.sets
    schedule = BatchSchedule([len(training_set)], [1], config.batch_size, config.seed)
    with prepare_batches(setup) as batches:
        trainer = Trainer(setup, batches)
        memory, images, regions, began = PeakMemory(), 0, 0, 0.0
        memory.start()
        for step in range(config.steps):
            if step == WARM_UP:
                images, regions, began = 0, 0, time.perf_counter()
            _, indices = schedule.batch(step)
            if uncached:
                _extract(setup.extractor, training_set, indices.tolist())
            report = trainer.step(step)
            float(report.loss)  # waits for a GPU
            images += report.num_images
            regions += int(training_set.counts[indices].sum())
        seconds = time.perf_counter() - began
    row = {
        "what": what,
        "runtime": "torch fp32",
        "batch": config.batch_size,
        "peak_mb": memory.peak_mb(),
    }
    yield row | _rates(images, regions, seconds)


def _extract(
    extractor: FeatureExtractor, training_set: TrainingSet, indices: Iterable[int]
) -> None:
    """Features of these pictures, from their files."""
    extractor.extract([extractor.prepare_item(training_set, index) for index in indices])


def _rates(images: int, regions: int, seconds: float) -> dict[str, Any]:
    return {
        "n": images,
        "images_per_s": images / seconds,
        "regions_per_s": regions / seconds,
        "seconds": seconds,
    }
