"""Train RegionSpot's head on frozen features (spec: "Training recipe").

Everything random is a function of (seed, step), so weights, optimiser, moving average and input
statistics are all the state there is: a run that is killed and resumed ends with the same weights,
on the CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regionspot.config import TrainConfig
from regionspot.data.augmentation import CropFlip
from regionspot.data.collate import (
    AugmentedBatches,
    BatchSource,
    CachedBatches,
    FeatureStore,
    RegionLimit,
)
from regionspot.data.dataset import BatchSchedule, TrainingSet
from regionspot.data.extraction import fill_caches
from regionspot.data.feature_cache import SelectedFeatures
from regionspot.errors import InputError, first_few
from regionspot.modeling.checkpoint import save_head
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.sam import SamBackbone
from regionspot.progress import Progress
from regionspot.provenance import git_commit
from regionspot.training.metrics import MetricsLog
from regionspot.training.resume import Checkpoint, RunDirectory, versions
from regionspot.training.setup import Setup
from regionspot.training.trainer import StepReport, Trainer
from regionspot.transforms import ClipTransform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where the head is, and what it took.

    Attributes:
        steps: of the whole run.
        train_seconds: spent in steps, over all parts of a run that was resumed.
        feature_seconds: spent on features and class names this time.
        images, regions: of all data sets.
        loss: mean over the last interval of the log, NaN if no step was left to do.
    """

    head_path: Path
    run_directory: Path
    steps: int
    train_seconds: float
    feature_seconds: float
    images: int
    regions: int
    loss: float


def train(
    config: TrainConfig,
    on_step: Callable[[StepReport], None] | None = None,
    *,
    resume: str | Path | None = None,
    backbones: tuple[SamBackbone, ClipBackbone] | None = None,
) -> TrainResult:
    """Train a head, from annotation files to `<output_dir>/<name>/head.safetensors`.

    Logs the plan, the size of the features and the head's path.

    Args:
        on_step: called after each step.
        resume: "auto", a checkpoint's path, or None for a new run (see
            `RunDirectory.starting_point`).
        backbones: the frozen towers; by default those of `config.model`.

    Raises:
        InputError: something in the configuration or the data cannot be used, or the loss is no
            number any more.
        ArtifactError: a file is damaged, or cannot be written; what was saved before is whole.
    """
    run = RunDirectory(Path(config.output_dir) / config.name, config)
    checkpoint = run.starting_point(resume)
    setup = Setup.from_config(config, backbones)
    _check_inputs(checkpoint, setup)
    plan = setup.describe()
    logger.info(plan)
    began = time.monotonic()
    # names that mean the same are an error before features are computed, which takes long
    _ = setup.vocabularies
    run.begin(plan)
    used_gpus = [setup.device] if setup.device.type == "cuda" else []
    with prepare_batches(setup) as batches, torch.random.fork_rng(devices=used_gpus):
        _check_skipped(checkpoint, setup, run)
        trainer = Trainer(setup, batches, checkpoint)
        feature_seconds = time.monotonic() - began
        manifest = {"inputs": setup.inputs, "skipped": setup.skipped_files()}
        train_seconds, loss = _run_steps(trainer, run, checkpoint, on_step, manifest)
    head_path = run.path / "head.safetensors"
    save_head(trainer.finished_head(), head_path, _head_metadata(setup))
    logger.info(f"wrote {head_path}")
    return TrainResult(
        head_path,
        run.path,
        config.steps,
        train_seconds,
        feature_seconds,
        images=sum(map(len, setup.usable_images())),
        regions=sum(
            int(s.counts[i].sum()) for s, i in zip(setup.sets, setup.usable_images(), strict=True)
        ),
        loss=loss,
    )


@contextlib.contextmanager
def prepare_batches(setup: Setup) -> Iterator[BatchSource]:
    """Fills the feature caches and yields the source of batches."""
    config, features = setup.config, setup.config.features
    fill_caches(
        setup.caches,
        setup.extractor,
        features.batch_size,
        features.workers,
        max_skipped=features.max_skipped if features.on_error == "skip" else None,
        verify=features.verify,
    )
    sets, stores = _usable(setup)
    ratios = [dataset.ratio for dataset in config.datasets]
    schedule = BatchSchedule([len(s) for s in sets], ratios, config.batch_size, config.seed)
    limit = RegionLimit(config.max_regions_per_image, config.seed)
    if config.augmentation is None:
        yield CachedBatches(sets, stores, schedule, limit)
        return
    augmentation = CropFlip(**asdict(config.augmentation))
    transform = ClipTransform(setup.clip.image_size)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with setup.precision.autocast():
            return setup.clip.encode_image(images.to(setup.device))

    with AugmentedBatches(
        sets,
        stores,
        schedule,
        augmentation,
        transform,
        encode,
        config.seed,
        features.workers,
        limit,
    ) as batches:
        yield batches


def _usable(setup: Setup) -> tuple[list[TrainingSet], list[FeatureStore]]:
    """The data sets without skipped images, and their features."""
    in_memory = (
        sum(cache.num_bytes() for cache in setup.caches)
        <= setup.config.features.max_memory_gib * 2**30
    )
    sets = list(setup.sets)
    stores = [cache.load() if in_memory else cache.open() for cache in setup.caches]
    selected: list[FeatureStore] = list(stores)
    for index, images in enumerate(setup.usable_images()):
        if len(images) < len(sets[index]):
            sets[index] = sets[index].select(images)
            selected[index] = SelectedFeatures(stores[index], images)
    return sets, selected


@dataclass
class _Interval:
    """What happened since the last line of the log."""

    began: float
    steps: int = 0
    images: int = 0
    loss: Tensor | float = 0.0

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.images += report.num_images
        self.loss = self.loss + report.loss


def _run_steps(
    trainer: Trainer,
    run: RunDirectory,
    checkpoint: Checkpoint | None,
    on_step: Callable[[StepReport], None] | None,
    manifest: Mapping[str, Any],
) -> tuple[float, float]:
    """Does the steps that are left.

    Args:
        manifest: what checkpoints tell of the run besides its state.

    Returns:
        Seconds spent in steps since the run began, and the mean loss of the last interval.
    """
    config, start = trainer.config, checkpoint.step if checkpoint else 0
    earlier = float(checkpoint.manifest["train_seconds"]) if checkpoint else 0.0
    began, loss = time.monotonic(), math.nan
    interval = _Interval(began)
    with (
        MetricsLog(run.path, start, config.logging.tensorboard) as log,
        Progress(config.name, config.steps, "steps", start) as progress,
    ):
        for step in range(start, config.steps):
            report = trainer.step(step)
            interval.add(report)
            if report.step % config.logging.every == 0 or report.step == config.steps:
                loss = _log_interval(log, interval, report, progress.eta_s, run)
                note = (
                    f"loss {loss:.4f}  {interval.images / (time.monotonic() - interval.began):.0f} "
                    "images/s"
                )
                interval = _Interval(time.monotonic())
                progress.update(report.step, note)
            else:
                progress.update(report.step)
            if on_step is not None:
                on_step(report)
            if report.step % config.checkpoints.every == 0 or report.step == config.steps:
                seconds, state = earlier + time.monotonic() - began, trainer.state()
                _check_finite(interval, state, report.step, run)
                run.save(report.step, state, {"train_seconds": seconds, **manifest})
    return earlier + time.monotonic() - began, loss


def _log_interval(
    log: MetricsLog, interval: _Interval, report: StepReport, eta_s: float | None, run: RunDirectory
) -> float:
    """Write a line of the log; the interval's mean loss. Raises InputError if it is no number."""
    loss, seconds = float(interval.loss) / interval.steps, time.monotonic() - interval.began
    if not math.isfinite(loss):
        raise _diverged(f"the loss is {loss}", report.step, run)
    log.write(
        report.step,
        loss=loss,
        learning_rate=report.learning_rate,
        grad_norm=float(report.grad_norm),
        images_per_s=interval.images / seconds,
        eta_s=eta_s,
    )
    return loss


def _check_finite(
    interval: _Interval, state: Mapping[str, Tensor], step: int, run: RunDirectory
) -> None:
    """Raises InputError if the state of a step, or a loss since the last line of the log, is no
    number any more.
    """
    if not math.isfinite(loss := float(interval.loss)):
        raise _diverged(f"the loss is {loss}", step, run)
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise _diverged(f"the state has infinite or NaN values (in {broken[0]})", step, run)


def _diverged(what: str, step: int, run: RunDirectory) -> InputError:
    return InputError(
        f"{what} at step {step}: lower optimizer.learning_rate, or try amp=off, in another run by "
        f"name=NAME. This step is not saved; {run.describe_newest()}"
    )


def _check_inputs(checkpoint: Checkpoint | None, setup: Setup) -> None:
    """Raises InputError if a run would go on with other data, or other towers, than it began
    with.
    """
    if checkpoint is None:
        return
    old, now = checkpoint.manifest["inputs"], setup.inputs
    data = {name: of_set["data"] for name, of_set in now["sets"].items()}
    changed = [
        f"the data set {name}"
        for name in data
        if old["sets"].get(name, {}).get("data") != data[name]
    ]
    towers = {"clip_text": "CLIP's text tower", "clip_image": "CLIP's image tower"}
    changed += [tower for key, tower in towers.items() if old.get(key) != now[key]]
    changed += _changed_features(
        old.get("features"), now["features"], setup.config.features.runtime
    )
    if changed:
        raise InputError(
            f"{' and '.join(dict.fromkeys(changed))} changed since {checkpoint.path} was written. "
            "(A data set is its annotations, pictures and excluded classes.) Put back what it was "
            "trained on, or start another run by name=NAME"
        )


def _changed_features(
    old: Mapping[str, Any] | None, now: Mapping[str, Any], runtime: str
) -> list[str]:
    """What of that which features depend on is no more what it was."""
    if old is None:
        warnings.warn(
            "the checkpoint is of an earlier version, which did not record what its features were "
            "computed with: that SAM's weights are the same is not checked",
            stacklevel=3,
        )
        return []
    graphs = runtime != "torch"
    names = {
        "sam_weights": "the graphs of SAM in features.artifacts" if graphs else "SAM's weights",
        "clip_weights": "the graphs of CLIP in features.artifacts"
        if graphs
        else "CLIP's image tower",
    }
    changed = [key for key in now if old.get(key) != now[key]]
    return [names.get(key, f"how features are computed ({key})") for key in changed]


def _check_skipped(checkpoint: Checkpoint | None, setup: Setup, run: RunDirectory) -> None:
    """Writes the list of skipped images.

    Raises:
        InputError: the run began with other images.
    """
    skipped = setup.skipped_files()
    run.write_skipped(skipped)
    if checkpoint is None:
        return
    old = checkpoint.manifest.get("skipped", {})
    for name in {*old, *skipped}:
        differing = sorted({*old.get(name, {})} ^ {*skipped.get(name, {})})
        if differing:
            raise InputError(
                f"other images of the data set {name} are skipped than when {checkpoint.path} was "
                f"written ({first_few(differing)}): put back what it was trained on, or start "
                "another run by name=NAME"
            )


def _head_metadata(setup: Setup) -> dict[str, Any]:
    """How the head was made. No path of this machine, nothing that differs between equal runs."""
    config = setup.config
    return {
        "name": config.name,
        "preset": config.model.preset,
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "standardize_inputs": config.standardize_inputs,
        "optimizer": asdict(config.optimizer),
        "augmentation": asdict(config.augmentation) if config.augmentation else None,
        "loss_reduction": config.loss_reduction,
        "multimask": config.features.multimask,
        "inputs": setup.inputs,
        "versions": versions(),
        "git_commit": git_commit(),
    }
