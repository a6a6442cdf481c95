"""The ways to score a region that are measured side by side: RegionSpot's head, baselines, one
control.

Each is a function of a batch of encoded images and of the words' embeddings that gives logits (B,
N, V). The head and its control go through a `RegionPipeline`, in any runtime; the baselines use
CLIP's own modules, so they need PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from regionspot.errors import InputError
from regionspot.evaluation.baselines import (
    CropSetting,
    PoolingSetting,
    RegionEmbedder,
    crop_embedder,
    crop_settings,
    pooling_embedder,
    pooling_settings,
)
from regionspot.evaluation.batches import RegionBatch
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.losses import region_logits
from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.runtime.scores import best_reading
from regionspot.structures import FloatArray

RegionScorer = Callable[[RegionBatch, FloatArray], FloatArray]
"""Logits (B, N, V) of a batch's regions over words with embeddings (V, E); rows of padding mean
nothing.
"""

Start = Callable[[RegionPipeline, RegionSpot | None], RegionScorer]
"""Takes the model as a pipeline, and as itself where it is there."""


@dataclass(frozen=True)
class Method:
    """One way to score regions: what it is in words, what it needs, and how to start one run of it.

    `tuned_on` says where a setting that was chosen was chosen, for the protocol.
    """

    description: str
    start: Start = field(repr=False)
    needs_mask_tokens: bool = False
    needs_patch_tokens: bool = False
    needs_masks: bool = False
    needs_torch: bool = False
    tuned_on: Mapping[str, Any] | None = None


def score_with_head(pipeline: RegionPipeline, _: RegionSpot | None) -> RegionScorer:
    """RegionSpot itself: all regions of an image at once, padding masked out.

    For a head that was trained on SAM's multimask tokens each reading of all regions is a set of
    its own, as in prediction, and of each region the reading with the highest predicted IoU counts.
    """

    def score(batch: RegionBatch, text_embeddings: FloatArray) -> FloatArray:
        assert (
            batch.mask_tokens is not None
            and batch.patch_tokens is not None
            and batch.iou_predictions is not None
        )
        logits = pipeline.classify_readings(
            batch.mask_tokens, batch.patch_tokens, batch.valid, text_embeddings
        )
        return best_reading(logits, batch.iou_predictions)

    return score


def scored_by(embedder: Callable[[RegionSpot], RegionEmbedder]) -> Start:
    """Cosines of what a baseline embeds, at CLIP's own scale."""

    def start(_: RegionPipeline, model: RegionSpot | None) -> RegionScorer:
        if model is None:
            raise InputError(
                "this baseline runs CLIP's own modules: give it the model, not a pipeline of it"
            )
        embed = embedder(model)

        def score(batch: RegionBatch, text_embeddings: FloatArray) -> FloatArray:
            with model.inference():
                words = torch.from_numpy(text_embeddings).to(model.device)  # (V, E)
                embeddings = embed(batch).float()  # of a half-precision model: words are in float32
                found: FloatArray = (
                    region_logits(embeddings, words, model.clip.logit_scale).float().cpu().numpy()
                )
            return found

        return score

    return start


class ConstantToken:
    """The control: the head with one token for every region, so that nothing says which region is
    meant.

    The token is the mean over the first batch, and stays that for the whole run. Of several
    readings of a region the one with the highest predicted IoU counts.
    """

    def __init__(self, pipeline: RegionPipeline, _: RegionSpot | None = None) -> None:
        self._pipeline = pipeline
        self._token: FloatArray | None = None

    def __call__(self, batch: RegionBatch, text_embeddings: FloatArray) -> FloatArray:
        assert (
            batch.mask_tokens is not None
            and batch.patch_tokens is not None
            and batch.iou_predictions is not None
        )
        if self._token is None:
            self._token = best_reading(batch.mask_tokens, batch.iou_predictions)[batch.valid].mean(
                0
            )  # (C,)
        same = np.tile(self._token, (*batch.valid.shape, 1))  # (B, N, C)
        return self._pipeline.classify(same, batch.patch_tokens, batch.valid, text_embeddings)


def clip_crops(setting: CropSetting) -> Method:
    return Method(
        f"CLIP on box crops: {setting}",
        scored_by(lambda model: crop_embedder(model, setting)),
        needs_masks=setting.background == "masked",
        needs_torch=True,
    )


def pooling(setting: PoolingSetting) -> Method:
    return Method(
        f"CLIP's {setting}",
        scored_by(lambda model: pooling_embedder(model, setting)),
        needs_patch_tokens=setting.features == "tokens",
        needs_masks=setting.over == "masks",
        needs_torch=True,
    )


def ensemble(first: Method, second: Method) -> Method:
    """Two methods together: their logits added, with equal weights."""

    def start(pipeline: RegionPipeline, model: RegionSpot | None) -> RegionScorer:
        scorers = [method.start(pipeline, model) for method in (first, second)]

        def score(batch: RegionBatch, text_embeddings: FloatArray) -> FloatArray:
            one, other = (score(batch, text_embeddings) for score in scorers)
            return one + other

        return score

    return Method(
        f"{first.description} and {second.description}, logits added",
        start,
        first.needs_mask_tokens or second.needs_mask_tokens,
        first.needs_patch_tokens or second.needs_patch_tokens,
        first.needs_masks or second.needs_masks,
        first.needs_torch or second.needs_torch,
    )


def head_of(model: RegionSpot, description: str) -> Method:
    """The head of another model, on the same encoded images: its SAM and CLIP must be those of the
    measured model.
    """
    pipeline = pipeline_from_model(model)
    return replace(HEAD, description=description, start=lambda *_: score_with_head(pipeline, model))


HEAD = Method("RegionSpot's head", score_with_head, needs_mask_tokens=True, needs_patch_tokens=True)

METHODS: dict[str, Method] = {
    "head": HEAD,
    "clip_crops": clip_crops(CropSetting()),
    "roi_pooling": pooling(PoolingSetting("boxes")),
    "mask_pooling": pooling(PoolingSetting("masks")),
    "constant_token": Method(
        "the head with one constant mask token",
        ConstantToken,
        needs_mask_tokens=True,
        needs_patch_tokens=True,
    ),
    "head_and_crops": ensemble(HEAD, clip_crops(CropSetting())),
}
"""By name, each at its default setting."""


def candidates(clip: ClipBackbone) -> dict[str, list[Method]]:
    """By name, a baseline at each of the settings that are worth trying."""
    return {
        "clip_crops": [
            clip_crops(setting) for setting in crop_settings(clip.image_size, clip.patch_size)
        ],
        "roi_pooling": [pooling(setting) for setting in pooling_settings("boxes")],
        "mask_pooling": [pooling(setting) for setting in pooling_settings("masks")],
    }


def methods_named(names: Sequence[str]) -> dict[str, Method]:
    """Those of METHODS. Raises InputError for a name that is not there, or none at all."""
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise InputError(f"unknown methods {unknown}: choose from {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}


def check_runs_in(methods: Mapping[str, Method], runtime: str) -> None:
    """Raises InputError for a method that this runtime has not."""
    wanting = [name for name, method in methods.items() if method.needs_torch]
    if wanting and runtime != "torch":
        anywhere = ", ".join(name for name, method in METHODS.items() if not method.needs_torch)
        raise InputError(
            f"{' and '.join(wanting)} run CLIP's own modules in PyTorch, not exported graphs in "
            f"{runtime}: leave out --runtime and --artifacts, or choose from {anywhere}"
        )
