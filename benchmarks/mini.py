"""What RegionSpot's head adds to SAM and CLIP, measured in the mini world: `python -m
regionspot.benchmarks.mini`.

The head is trained anew for each seed, and once more, with the first seed, on a box embedding in
place of SAM's mask token. Every baseline takes the setting that is best on training pictures. The
figures are of pictures on which nothing was chosen.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regionspot.benchmarks.conditions import conditions
from regionspot.cli.outputs import json_bytes, write_output
from regionspot.config import TrainConfig
from regionspot.data.coco_json import CocoDataset
from regionspot.data.dataset import TrainingSet
from regionspot.data.extraction import FeatureExtractor
from regionspot.data.feature_cache import Features
from regionspot.data.formats import load_dataset
from regionspot.data.json_reading import Id
from regionspot.evaluation.baselines import CropSetting
from regionspot.evaluation.evaluator import Metrics, evaluate_methods
from regionspot.evaluation.methods import HEAD, METHODS, Method, clip_crops
from regionspot.evaluation.proposals import ground_truth_proposals
from regionspot.evaluation.tuning import first_with_objects, tuned_methods
from regionspot.logs import log_to
from regionspot.mini.dataset import build_dataset
from regionspot.mini.recipe import head_recipe
from regionspot.mini.shipped import load_mini_backbones
from regionspot.mini.world import CATEGORIES
from regionspot.modeling.checkpoint import load_head
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone
from regionspot.modeling.token_decoder import ImageContext, MaskTokens, TokenDecoder
from regionspot.runtime.graph_spec import NUM_PROJECTIONS, NUM_STATISTICS
from regionspot.structures import FloatArray, Prompts, Vocabulary
from regionspot.tables import markdown_table
from regionspot.training.loop import train
from regionspot.training.setup import Setup
from regionspot.vocabulary import VocabularyEncoder

Backbones = tuple[SamBackbone, ClipBackbone]

OF_CLIP = ("clip_crops", "roi_pooling", "mask_pooling")
"""What no seed of the head's training changes."""

BOX_EMBEDDING = "box_embedding"
BATCH_SIZE = 16
NUM_TO_TUNE_ON = 200  # training pictures on which the baselines' settings are chosen

CROPS_BESIDE = tuple(
    clip_crops(CropSetting(scale, "squeezed", size, "masked"))
    for scale, size in ((1.3, 96), (1.6, 96), (2.0, 96), (2.0, 144), (2.5, 144))
)
"""Measured on the validation split itself, to show how much the choice on training pictures costs
the crops there.
"""


class BoxTokenDecoder(nn.Module):
    """In place of SAM's `TokenDecoder`: a prompt's token says where its box is, and nothing of what
    is there.
    """

    def __init__(self, decoder: TokenDecoder, token_dim: int) -> None:
        super().__init__()
        self.image_size = decoder.image_size
        self.embedding_size = decoder.embedding_size
        self.token_dim = token_dim

    def image_part(self, image_embeddings: Tensor) -> ImageContext:
        """Zeros of the shapes that SAM's has."""
        batch, channels, height, width = image_embeddings.shape
        zeros = image_embeddings.new_zeros
        return ImageContext(
            zeros(batch, NUM_PROJECTIONS, channels // 2, height * width),
            zeros(batch, NUM_STATISTICS, height * width),
        )

    def prompt_part(
        self,
        context: ImageContext,
        points: Tensor,
        labels: Tensor,
        token_ids: Tensor,
        predict_iou: bool = True,
    ) -> MaskTokens:
        """Tokens (B, N, 1, C) of boxes, which are points (B, N, 2, 2); all IoUs are 1."""
        if len(token_ids) != 1 or points.shape[2] != 2:
            raise ValueError("a box embedding knows single boxes alone")
        tokens = box_embeddings(points.float() / self.image_size, self.token_dim)[:, :, None]
        return MaskTokens(tokens, tokens.new_ones(*tokens.shape[:3]))


class BoxEmbedding(SamBackbone):
    """SAM with sines and cosines of the box's corners in place of its mask token."""

    def __init__(self, sam: SamBackbone) -> None:
        super().__init__(sam.sam)
        self.token_decoder = BoxTokenDecoder(sam.token_decoder, sam.token_dim)  # type: ignore[assignment]

    def encode_image(
        self, images: Tensor, input_sizes: Tensor, export_for_gpu: bool = False
    ) -> Tensor:
        """Zeros (B, C, h, w): nothing of the picture is read."""
        return torch.zeros(len(images), self.token_dim, *self.embedding_size, device=images.device)


def box_embeddings(corners: Tensor, token_dim: int) -> Tensor:
    """(..., 2, 2) corners, in sides of the picture, to (..., token_dim).

    The wavelengths of each coordinate run from the picture's side down to 1/64 of it.
    """
    frequencies = (
        2 * math.pi * torch.logspace(0, 6, token_dim // 8, base=2.0, device=corners.device)
    )  # (F,)
    angles = (corners.flatten(-2)[..., None] * frequencies).flatten(-2)  # (..., 4F)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@log_to("stdout")
def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    report = _measure(arguments)
    write_output(arguments.json, json_bytes(report))
    for name, figures in report["crops_at_other_settings_on_val"].items():
        print(f"{name}: top-1 {figures['top1']}")
    for name, of_split in report["splits"].items():
        print(f"\n{name}\n{format_summary(of_split)}")
    return 0


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds the world, trains a head of each seed, and measures them and the baselines."""
    long_tail = arguments.long_tail
    train_json, val_json, crowds_json = build_dataset(
        arguments.out / "data",
        arguments.train,
        arguments.val,
        num_crowds=arguments.crowds,
        long_tail=long_tail,
    )
    backbones = load_mini_backbones()
    vocabularies = VocabularyEncoder(backbones[1])
    training = load_dataset(train_json)
    splits = {"val": load_dataset(val_json), "crowds": load_dataset(crowds_json)}
    words = {name: vocabularies.encode(dataset.class_names) for name, dataset in splits.items()}
    heads = [_trained(_recipe(arguments, train_json, seed), backbones) for seed in arguments.seeds]
    to_tune_on = first_with_objects(training, NUM_TO_TUNE_ON)
    best = tuned_methods(
        heads[0], to_tune_on, vocabularies.encode(training.class_names), batch_size=BATCH_SIZE
    )
    of_head = {name: method for name, method in best.items() if name not in OF_CLIP}
    measured = [(heads[0], best), *((head, of_head) for head in heads[1:])]
    if arguments.box_embedding:
        measured.append(
            (_trained_on_boxes(arguments, train_json, backbones), {BOX_EMBEDDING: HEAD})
        )
    summaries = {
        name: _measured_split(measured, dataset, words[name]) for name, dataset in splits.items()
    }
    beside = _measured(
        heads[0], splits["val"], words["val"], {each.description: each for each in CROPS_BESIDE}
    )
    return {
        "benchmark": "mini",
        "splits": summaries,
        "crops_at_other_settings_on_val": {
            name: _over_seeds([metrics], statistics.mean) for name, metrics in beside.items()
        },
        "conditions": conditions(
            train_images=len(training.images),
            train_regions=training.num_annotations,
            long_tail=long_tail,
            seeds=arguments.seeds,
            steps=_recipe(arguments, train_json, 0).steps,
            settings_chosen_on=f"the first {NUM_TO_TUNE_ON} training pictures",
        ),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regionspot.benchmarks.mini", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/mini-claim"), help="pictures, features and heads"
    )
    parser.add_argument(
        "--train", type=int, default=40_000, metavar="N", help="training pictures (%(default)s)"
    )
    parser.add_argument(
        "--val", type=int, default=1000, metavar="N", help="held-out pictures (%(default)s)"
    )
    parser.add_argument(
        "--crowds", type=int, default=100, metavar="N", help="held-out crowds (%(default)s)"
    )
    parser.add_argument(
        "--long-tail", action="store_true", help="train on a long tail of categories"
    )
    parser.add_argument(
        "--box-embedding",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train on it too (default)",
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=[0, 1, 2], metavar="LIST", help="of the training (0,1,2)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of each training (default: those of mini.yaml)"
    )
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="the report")
    return parser


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _recipe(
    arguments: argparse.Namespace, train_json: Path, seed: int, suffix: str = ""
) -> TrainConfig:
    return head_recipe(
        train_json, arguments.out, f"seed{seed}{suffix}", seed, arguments.steps, f"features{suffix}"
    )


def _trained_on_boxes(
    arguments: argparse.Namespace, train_json: Path, backbones: Backbones
) -> RegionSpot:
    sam, clip = backbones
    box, seed = BoxEmbedding(sam), arguments.seeds[0]
    of_masks = _recipe(arguments, train_json, seed)
    of_boxes = _recipe(arguments, train_json, seed, f"-{BOX_EMBEDDING}")
    _fill_box_features(
        Setup.from_config(of_masks, backbones), Setup.from_config(of_boxes, (box, clip))
    )
    return _trained(of_boxes, (box, clip))


def _trained(recipe: TrainConfig, backbones: Backbones) -> RegionSpot:
    """The model of a run, which goes on where an earlier one stopped."""
    head = load_head(train(recipe, resume="auto", backbones=backbones).head_path)
    return RegionSpot(*backbones, head, "regionspot_mini")


def _fill_box_features(of_masks: Setup, of_boxes: Setup) -> None:
    """Puts box embeddings beside CLIP's maps, which are those that are cached beside mask
    tokens.
    """
    (source,), (target,), extractor = of_masks.caches, of_boxes.caches, of_boxes.extractor
    training_set, dtype = target.training_set, np.dtype(target.shape.dtype)
    maps_of = source.open()
    for shard in target.missing_shards()[0]:
        images = target.shard_images(shard)
        tokens = [
            _box_tokens(extractor, training_set, int(image)) for image in images
        ]  # (n, 1, C) each
        _, maps = maps_of.gather(images)
        assert maps is not None
        target.write_shard(
            shard, Features(np.concatenate(tokens).astype(dtype), maps.numpy().astype(dtype))
        )


def _box_tokens(extractor: FeatureExtractor, training_set: TrainingSet, image: int) -> FloatArray:
    boxes = training_set.boxes[training_set.offsets[image] : training_set.offsets[image + 1]]
    prompts = Prompts.from_boxes(boxes)
    points = extractor.preparation.sam_transform.apply_points(
        prompts.points, *training_set.sizes[image].tolist()
    )
    info = extractor.pipeline.info
    tokens = box_embeddings(
        torch.from_numpy(points).float() / info.sam_image_size, info.token_dim
    )  # (n, C)
    return tokens[:, None].numpy()


def _measured_split(
    measured: Sequence[tuple[RegionSpot, Mapping[str, Method]]],
    dataset: CocoDataset,
    words: Vocabulary,
) -> dict[str, Any]:
    """The summary of a split, of models and the methods to measure with each."""
    runs: dict[str, list[Metrics]] = {}
    for model, methods in measured:
        for method, metrics in _measured(model, dataset, words, methods).items():
            runs.setdefault(method, []).append(metrics)
    return _summary(runs)


def _measured(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, methods: Mapping[str, Method]
) -> dict[str, Metrics]:
    groups: dict[str, set[Id]] = {
        f"novel_{kind}s": {c.id for c in CATEGORIES if c.novelty == kind}
        for kind in ("pair", "word")
    }
    proposals = ground_truth_proposals(dataset)
    results = evaluate_methods(
        model, dataset, vocabulary, proposals, methods, batch_size=BATCH_SIZE, groups=groups
    )
    return {name: metrics for name, (metrics, _) in results.items()}


def _summary(runs: Mapping[str, Sequence[Metrics]]) -> dict[str, Any]:
    """For each method the mean of its figures over the seeds, their standard deviation, and the
    protocol.
    """
    order = [*METHODS, BOX_EMBEDDING]
    return {
        method: {
            "mean": _over_seeds(runs[method], statistics.mean),
            "deviation": _over_seeds(runs[method], statistics.stdev)
            if len(runs[method]) > 1
            else None,
            "seeds": len(runs[method]),
            "protocol": runs[method][0]["protocol"],
        }
        for method in sorted(runs, key=order.index)
    }


def _over_seeds(runs: Sequence[Metrics], reduce: Any) -> dict[str, Any]:
    flat = [
        {key: value for key, value in run.items() if not isinstance(value, dict)}
        | {f"one_label_{key}": value for key, value in run["one_label"].items()}
        for run in runs
    ]
    return {
        key: None if flat[0][key] is None else round(reduce([run[key] for run in flat]), 2)
        for key in flat[0]
    }


COLUMNS = (
    "top1", "top1_base", "top1_novel", "top1_novel_pairs", "top1_novel_words",
    "top1s", "top1m", "top1l", "top1r", "top1c", "top1f",
    "AP", "AP_base", "AP_novel", "one_label_AP", "one_label_AP_base", "one_label_AP_novel",
)  # fmt: skip


def format_summary(of_split: Mapping[str, Any]) -> str:
    """A row of figures for each method, as a table in Markdown."""
    rows = []
    for method, entry in of_split.items():
        deviation = entry["deviation"] or {}
        rows.append(
            [method, *(_cell(entry["mean"].get(name), deviation.get(name)) for name in COLUMNS)]
        )
    return markdown_table(["method", *COLUMNS], rows)


def _cell(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
