"""What a run needs before its first step: towers, data sets, feature caches, the head. Nothing is
computed yet.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from regionspot.config import DatasetConfig, TrainConfig
from regionspot.data.dataset import IntArray, TrainingSet, describe_left_out, load_training_set
from regionspot.data.extraction import FeatureExtractor, describe_cache, make_cache
from regionspot.data.feature_cache import FeatureCache, check_space
from regionspot.errors import ArtifactError, InputError
from regionspot.modeling.checkpoint import load_head
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.devices import resolve_device
from regionspot.modeling.head import RegionHead
from regionspot.modeling.pipelines import pipeline_from_backbones, weights_fingerprint
from regionspot.modeling.precision import resolve_dtype
from regionspot.modeling.presets import create_backbones
from regionspot.modeling.sam import SamBackbone
from regionspot.runtime.pipeline import SAM_GRAPHS, RegionPipeline
from regionspot.structures import Vocabulary
from regionspot.training.optim import Precision
from regionspot.vocabulary import SameMeaningError, VocabularyEncoder


@dataclass(frozen=True, eq=False)
class Setup:
    """A run's parts. `sets` and `caches` go together, one for each data set."""

    config: TrainConfig
    device: torch.device
    precision: Precision
    sam: SamBackbone
    clip: ClipBackbone
    sets: list[TrainingSet]
    extractor: FeatureExtractor
    caches: list[FeatureCache]

    @cached_property
    def vocabularies(self) -> list[Vocabulary]:
        """The class names of each data set, embedded by CLIP's text tower.

        Raises:
            InputError: different names of a data set have the same embedding, and its
                `same_meaning` is "error".
        """
        return [
            encode_classes(self.clip, training_set, dataset.same_meaning)
            for training_set, dataset in zip(self.sets, self.config.datasets, strict=True)
        ]

    @cached_property
    def skipped(self) -> list[dict[int, str]]:
        """Of each data set the images that have no features, and why. The caches must be filled."""
        return [cache.skipped() for cache in self.caches]

    def usable_images(self) -> list[IntArray]:
        """The indices of each data set's images that have features. The caches must be filled."""
        return [
            np.setdiff1d(np.arange(len(training_set)), np.array(sorted(skipped), np.int64))
            for training_set, skipped in zip(self.sets, self.skipped, strict=True)
        ]

    def skipped_files(self) -> dict[str, dict[str, str]]:
        """Data set -> file name -> why it is skipped; data sets without any are left out."""
        files = {
            training_set.name: {
                training_set.file_names[image]: why for image, why in sorted(skipped.items())
            }
            for training_set, skipped in zip(self.sets, self.skipped, strict=True)
        }
        return {name: reasons for name, reasons in files.items() if reasons}

    @classmethod
    def from_config(
        cls, config: TrainConfig, backbones: tuple[SamBackbone, ClipBackbone] | None = None
    ) -> Setup:
        """Load the towers, unless they are passed in, and read the annotation files.

        Raises:
            InputError, ArtifactError: the device cannot do what is asked, or a weight file, an
                annotation file or an image is missing or unusable.
        """
        device = resolve_device(config.device)
        precision = Precision.resolve(config.amp, device)
        sets = [_load_set(d, config.features.on_error == "skip") for d in config.datasets]
        model = config.model
        sam, clip = backbones or create_backbones(
            model.preset, model.sam_weights, model.clip_weights
        )
        sam, clip = sam.to(device), clip.to(device)
        features = config.features
        pipeline = _feature_pipeline(config, sam, clip)
        extractor = FeatureExtractor(
            pipeline, config.augmentation is None, features.multimask, features.dtype
        )
        caches = [
            make_cache(features.cache_dir, s, extractor, features.images_per_shard) for s in sets
        ]
        return cls(config, device, precision, sam, clip, sets, extractor, caches)

    def build_head(self) -> RegionHead:
        """The head to train, on its device: of random weights drawn from the seed, or those of
        `model.initial_head`.
        """
        model = self.config.model
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed)
            head = RegionHead(
                self.sam.token_dim,
                self.clip.width,
                self.clip.embed_dim,
                model.num_layers,
                model.num_heads,
                model.feedforward_dim,
                model.dropout,
                self.config.features.multimask,
            )
        if model.initial_head:
            _load_initial_head(head, model.initial_head)
        return head.to(self.device)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What the run learns from, by content: a resumed run must have the same."""
        return {
            "sets": {
                training_set.name: {"data": training_set.digest} for training_set in self.sets
            },
            "features": self.extractor.depends_on(),
            "clip_text": self.clip.fingerprint(),
            "clip_image": weights_fingerprint(visual=self.clip.clip.visual),
        }

    def describe(self) -> str:
        """The plan, for people."""
        config, epochs = self.config, self._epochs()
        lines = [f"run {config.name}: {config.model.preset} on {self.device}"]
        if config.features.runtime != "torch":
            lines.append(f"features by {config.features.runtime} from {config.features.artifacts}")
        elif config.features.precision not in (None, "fp32"):
            lines.append(f"features by torch in {config.features.precision}")
        for training_set, epoch in zip(self.sets, epochs, strict=True):
            lines.append(
                f"data set {training_set.name}: {len(training_set)} images, "
                f"{training_set.num_regions} regions, {len(training_set.class_names)} classes, "
                f"{epoch:.1f} epochs; {describe_left_out(training_set.left_out)}"
            )
            lines += [f"  {note}" for note in training_set.notes]
        parameters = sum(p.numel() for p in self.build_head().parameters())
        lines.append(
            f"head: {parameters:,} parameters; {config.steps} steps of {config.batch_size} images, "
            "one data set each"
        )
        return "\n".join(lines)

    def describe_caches(self) -> str:
        """The size estimate of each cache, without a look into the shards that are there.

        Raises:
            InputError: the disk has not enough space for all that are to be made.
        """
        missing = [cache.absent_shards() for cache in self.caches]
        check_space(self.caches, missing)
        return "\n".join(map(describe_cache, self.caches, missing))

    def _epochs(self) -> list[float]:
        ratios = [dataset.ratio for dataset in self.config.datasets]
        images = self.config.steps * self.config.batch_size
        return [images * r / sum(ratios) / len(s) for r, s in zip(ratios, self.sets, strict=True)]


def encode_classes(clip: ClipBackbone, training_set: TrainingSet, same_meaning: str) -> Vocabulary:
    """Embeds the class names of a data set.

    Raises:
        InputError: different names have the same embedding, and `same_meaning` is "error".
    """
    names = training_set.class_names
    try:
        return VocabularyEncoder(clip).encode(
            names, same_meaning="error" if same_meaning == "error" else "warn"
        )
    except InputError as error:
        hint = (
            ". (datasets.*.same_meaning=warn trains all the same.)"
            if isinstance(error, SameMeaningError)
            else ""
        )
        raise InputError(f"data set {training_set.name}: {error}{hint}") from error


def _load_set(dataset: DatasetConfig, skip_missing: bool) -> TrainingSet:
    return load_training_set(
        dataset.name,
        dataset.annotations,
        dataset.images,
        exclude=dataset.exclude,
        clean_names=dataset.clean_names,
        missing_images="keep" if skip_missing else "stop",
    )


def _feature_pipeline(config: TrainConfig, sam: SamBackbone, clip: ClipBackbone) -> RegionPipeline:
    """What extracts features: the towers themselves, or artefacts that were made of them.

    Raises:
        InputError: the artefacts are of another model, or of other weights of its SAM or CLIP.
        ArtifactError: there are none that are usable.
    """
    features, preset = config.features, config.model.preset
    if features.artifacts is None:
        if features.precision not in (None, "fp32"):
            half = resolve_dtype(features.precision)
            sam, clip = copy.deepcopy(sam).to(dtype=half), copy.deepcopy(clip).to(dtype=half)
        return pipeline_from_backbones(sam, clip, preset)
    towers = pipeline_from_backbones(sam, clip, preset)
    from regionspot.runtime.artifacts import Manifest
    from regionspot.runtime.formats import runtime_named
    from regionspot.runtime.opening import choose_artifacts, open_pipeline

    manifest = Manifest.load(features.artifacts)
    artefact_format, precision = choose_artifacts(
        manifest,
        features.runtime,
        features.precision,
        runtime_named(features.runtime, whole_models=True).best_device(),
    )
    made = {
        entry.name: entry.weights
        for entry in manifest.graphs
        if entry.key[1:] == (artefact_format, precision)
    }

    def is_other(graph: str) -> bool:
        return graph in made and made[graph] != towers.fingerprint(graph)

    others = ["SAM"] if any(map(is_other, SAM_GRAPHS)) else []
    if manifest.model.text_fingerprint != towers.info.text_fingerprint or is_other(
        "clip_image_encoder"
    ):
        others.append("CLIP")
    if manifest.model.name != preset or others:
        raise InputError(
            f"features.artifacts {features.artifacts} is of {manifest.model.name}, and this run of "
            f"{preset}"
            + (
                f" with other weights of {' and '.join(others)}"
                if manifest.model.name == preset
                else ""
            )
            + ": export this run's model, or set features.runtime=torch"
        )
    # on a device of the runtime's
    return open_pipeline(features.artifacts, features.runtime, precision)


def _load_initial_head(head: RegionHead, path: str) -> None:
    """Raises ArtifactError unless the file's head is of the same size and for the same mask
    tokens.
    """
    initial = load_head(path)
    sizes = (
        "token_dim",
        "clip_width",
        "embed_dim",
        "num_layers",
        "num_heads",
        "feedforward_dim",
        "multimask",
    )
    wrong = [
        f"{size} {getattr(initial, size)} instead of {getattr(head, size)}"
        for size in sizes
        if getattr(initial, size) != getattr(head, size)
    ]
    if wrong:
        raise ArtifactError(
            f"model.initial_head {path} has {', '.join(wrong)}: it was made for another model"
        )
    head.load_state_dict(initial.state_dict())
