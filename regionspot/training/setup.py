"""What a run needs before its first step: towers, data sets, feature caches, the head. Nothing is computed yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from regionspot.config import TrainConfig
from regionspot.data.dataset import TrainingSet, load_training_set
from regionspot.data.extraction import FeatureExtractor, describe_cache, make_cache
from regionspot.data.feature_cache import FeatureCache, check_space
from regionspot.errors import ArtifactError, InputError
from regionspot.modeling.checkpoint import load_head
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.devices import resolve_device
from regionspot.modeling.head import RegionHead
from regionspot.modeling.pipelines import pipeline_from_backbones, weights_fingerprint
from regionspot.modeling.presets import create_backbones
from regionspot.modeling.sam import SamBackbone
from regionspot.runtime.pipeline import SAM_GRAPHS, RegionPipeline
from regionspot.training.optim import Precision


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

    @classmethod
    def from_config(cls, config: TrainConfig, backbones: tuple[SamBackbone, ClipBackbone] | None = None) -> Setup:
        """Load the towers, unless they are passed in, and read the annotation files.

        Raises:
            InputError, ArtifactError: the device cannot do what is asked, or a weight file, an annotation file or an
                image is missing or unusable.
        """
        device = resolve_device(config.device)
        precision = Precision.resolve(config.amp, device)
        sets = [load_training_set(d.name, d.annotations, d.images) for d in config.datasets]
        model = config.model
        sam, clip = backbones or create_backbones(model.preset, model.sam_weights, model.clip_weights)
        sam, clip = sam.to(device), clip.to(device)
        features = config.features
        pipeline = _feature_pipeline(config, sam, clip)
        extractor = FeatureExtractor(pipeline, config.augmentation is None, features.multimask, features.dtype)
        caches = [make_cache(features.cache_dir, s, extractor, features.images_per_shard) for s in sets]
        return cls(config, device, precision, sam, clip, sets, extractor, caches)

    def build_head(self) -> RegionHead:
        """The head to train, on its device: of random weights drawn from the seed, or those of `model.initial_head`."""
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
            )
        if model.initial_head:
            _load_initial_head(head, model.initial_head)
        return head.to(self.device)

    def inputs(self) -> dict[str, Any]:
        """What the run learns from, by content: a resumed run must have the same."""
        sets = {s.name: {"data": s.digest, "features": c.key} for s, c in zip(self.sets, self.caches, strict=True)}
        return {
            "sets": sets,
            "clip_text": self.clip.fingerprint(),
            "clip_image": weights_fingerprint(visual=self.clip.clip.visual),
        }

    def describe(self) -> str:
        """The plan, for people."""
        config, epochs = self.config, self._epochs()
        lines = [f"run {config.name}: {config.model.preset} on {self.device}"]
        if config.features.runtime != "torch":
            lines.append(f"features by {config.features.runtime} from {config.features.artifacts}")
        for training_set, epoch in zip(self.sets, epochs, strict=True):
            dropped = f"; left out {training_set.dropped_images} images, {training_set.dropped_regions} regions"
            lines.append(
                f"data set {training_set.name}: {len(training_set)} images, {training_set.num_regions} regions, "
                f"{len(training_set.class_names)} classes, {epoch:.1f} epochs{dropped}"
            )
        parameters = sum(p.numel() for p in self.build_head().parameters())
        lines.append(
            f"head: {parameters:,} parameters; {config.steps} steps of {config.batch_size} images, one data set each"
        )
        return "\n".join(lines)

    def describe_caches(self) -> str:
        """The size estimate of each cache; shards that are there are not verified.

        Raises:
            InputError: the disk has not enough space for all that are to be made.
        """
        missing = [cache.missing_shards(verify=False)[0] for cache in self.caches]
        check_space(self.caches, missing)
        return "\n".join(map(describe_cache, self.caches, missing))

    def _epochs(self) -> list[float]:
        ratios = [dataset.ratio for dataset in self.config.datasets]
        images = self.config.steps * self.config.batch_size
        return [images * r / sum(ratios) / len(s) for r, s in zip(ratios, self.sets, strict=True)]


def _feature_pipeline(config: TrainConfig, sam: SamBackbone, clip: ClipBackbone) -> RegionPipeline:
    """What extracts features: the towers themselves, or artefacts that were made of them.

    Raises:
        InputError: the artefacts are of another model, or of other weights of its SAM or CLIP.
        ArtifactError: there are none that are usable.
    """
    features, preset = config.features, config.model.preset
    towers = pipeline_from_backbones(sam, clip, preset)
    if features.artifacts is None:
        return towers
    from regionspot.runtime.artifacts import Manifest, choose_artifacts, pipeline_from_artifacts

    manifest = Manifest.load(features.artifacts)
    artefact_format, precision = choose_artifacts(manifest, features.runtime, features.precision)
    made = {entry.name: entry.weights for entry in manifest.graphs if entry.key[1:] == (artefact_format, precision)}

    def is_other(graph: str) -> bool:
        return graph in made and made[graph] != towers.fingerprint(graph)

    others = ["SAM"] if any(map(is_other, SAM_GRAPHS)) else []
    if manifest.model.text_fingerprint != towers.info.text_fingerprint or is_other("clip_image_encoder"):
        others.append("CLIP")
    if manifest.model.name != preset or others:
        raise InputError(
            f"features.artifacts {features.artifacts} is of {manifest.model.name}, and this run of {preset}"
            + (f" with other weights of {' and '.join(others)}" if manifest.model.name == preset else "")
            + ": export this run's model, or set features.runtime=torch"
        )
    return pipeline_from_artifacts(features.artifacts, features.runtime, precision)  # on a device of the runtime's


def _load_initial_head(head: RegionHead, path: str) -> None:
    """Raises ArtifactError unless the file's head is of the same size."""
    initial = load_head(path)
    sizes = ("token_dim", "clip_width", "embed_dim", "num_layers", "num_heads", "feedforward_dim")
    wrong = [
        f"{size} {getattr(initial, size)} instead of {getattr(head, size)}"
        for size in sizes
        if getattr(initial, size) != getattr(head, size)
    ]
    if wrong:
        raise ArtifactError(f"model.initial_head {path} has {', '.join(wrong)}: it was made for another model")
    head.load_state_dict(initial.state_dict())
