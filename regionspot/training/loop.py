"""Train RegionSpot's head on frozen features (spec: "Training recipe").

Everything random is a function of (seed, step), so weights, optimiser, moving average and input statistics are all the
state there is: a run that is killed and resumed ends with the same weights, on the CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regionspot.config import TrainConfig
from regionspot.data.augmentation import CropFlip
from regionspot.data.collate import AugmentedBatches, BatchSource, CachedBatches, FeatureStore
from regionspot.data.dataset import BatchSchedule
from regionspot.data.extraction import fill_caches
from regionspot.errors import InputError
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
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Train a head, from annotation files to `<output_dir>/<name>/head.safetensors`.

    Args:
        on_step: called after each step.
        resume: "auto", a checkpoint's path, or None for a new run (see `RunDirectory.starting_point`).
        backbones: the frozen towers; by default those of `config.model`.
        say: takes lines for people.

    Raises:
        InputError: something in the configuration or the data cannot be used, or the loss is no number any more.
        ArtifactError: a file is damaged, or cannot be written; what was saved before is whole.
    """
    run = RunDirectory(Path(config.output_dir) / config.name, config)
    checkpoint = run.starting_point(resume)
    setup = Setup.from_config(config, backbones)
    _check_inputs(checkpoint, setup.inputs())
    say(setup.describe())
    run.begin()
    began = time.monotonic()
    used_gpus = [setup.device] if setup.device.type == "cuda" else []
    with prepare_batches(setup, say) as batches, torch.random.fork_rng(devices=used_gpus):
        trainer = Trainer(setup, batches, checkpoint)
        feature_seconds = time.monotonic() - began
        train_seconds, loss = _run_steps(trainer, run, checkpoint, on_step)
    head_path = run.path / "head.safetensors"
    save_head(trainer.finished_head(), head_path, _head_metadata(setup))
    say(f"wrote {head_path}")
    return TrainResult(
        head_path,
        run.path,
        config.steps,
        train_seconds,
        feature_seconds,
        images=sum(map(len, setup.sets)),
        regions=sum(s.num_regions for s in setup.sets),
        loss=loss,
    )


@contextlib.contextmanager
def prepare_batches(setup: Setup, say: Callable[[str], None]) -> Iterator[BatchSource]:
    """Fill the feature caches and yield the source of batches."""
    config = setup.config
    fill_caches(setup.caches, setup.extractor, config.features.batch_size, config.features.workers, say)
    in_memory = sum(cache.num_bytes() for cache in setup.caches) <= config.features.max_memory_gib * 2**30
    stores: list[FeatureStore] = [cache.load() if in_memory else cache.open() for cache in setup.caches]
    ratios = [dataset.ratio for dataset in config.datasets]
    schedule = BatchSchedule([len(s) for s in setup.sets], ratios, config.batch_size, config.seed)
    if config.augmentation is None:
        yield CachedBatches(setup.sets, stores, schedule)
        return
    augmentation, transform = CropFlip(**asdict(config.augmentation)), ClipTransform(setup.clip.image_size)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with setup.precision.autocast():
            return setup.clip.encode_image(images.to(setup.device))

    with AugmentedBatches(
        setup.sets, stores, schedule, augmentation, transform, encode, config.seed, config.features.workers
    ) as batches:
        yield batches


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
    trainer: Trainer, run: RunDirectory, checkpoint: Checkpoint | None, on_step: Callable[[StepReport], None] | None
) -> tuple[float, float]:
    """Do the steps that are left.

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
                note = f"loss {loss:.4f}  {interval.images / (time.monotonic() - interval.began):.0f} images/s"
                interval = _Interval(time.monotonic())
                progress.update(report.step, note)
            else:
                progress.update(report.step)
            if on_step is not None:
                on_step(report)
            if report.step % config.checkpoints.every == 0 or report.step == config.steps:
                seconds, state = earlier + time.monotonic() - began, trainer.state()
                _check_finite(interval, state, report.step, run)
                run.save(report.step, state, {"train_seconds": seconds, "inputs": trainer.inputs})
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


def _check_finite(interval: _Interval, state: Mapping[str, Tensor], step: int, run: RunDirectory) -> None:
    """Raises InputError if the state of a step, or a loss since the last line of the log, is no number any more."""
    if not math.isfinite(loss := float(interval.loss)):
        raise _diverged(f"the loss is {loss}", step, run)
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise _diverged(f"the state has infinite or NaN values (in {broken[0]})", step, run)


def _diverged(what: str, step: int, run: RunDirectory) -> InputError:
    return InputError(
        f"{what} at step {step}: lower optimizer.learning_rate, or try amp=off, in another run by name=NAME. This step "
        f"is not saved; {run.describe_newest()}"
    )


def _check_inputs(checkpoint: Checkpoint | None, inputs: dict[str, Any]) -> None:
    """Raises InputError if a run would go on with other data, or other towers, than it began with."""
    if checkpoint is None:
        return
    old = checkpoint.manifest["inputs"]
    changed = [f"the data set {name}" for name, now in inputs["sets"].items() if old["sets"].get(name) != now]
    towers = {"clip_text": "CLIP's text tower", "clip_image": "CLIP's image tower"}
    changed += [tower for key, tower in towers.items() if old.get(key) != inputs[key]]
    if changed:
        raise InputError(
            f"{' and '.join(changed)} changed since {checkpoint.path} was written (annotations, images or weights): "
            "put back what it was trained on, or start another run by name=NAME"
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
        "inputs": setup.inputs(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
