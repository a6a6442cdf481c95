"""`regionspot demo`: the main job on the mini world, from pictures to a trained head, its accuracy,
and named regions.

The head is trained on few pictures, so that it takes minutes. The one that the package ships, the
same head trained on more, is measured beside it and names the regions of the overlays.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.outputs import json_bytes, write_output

if TYPE_CHECKING:
    import numpy as np

    from regionspot.config import TrainConfig
    from regionspot.data.coco_json import CocoDataset
    from regionspot.modeling.regionspot import RegionSpot
    from regionspot.structures import Vocabulary
    from regionspot.training.loop import TrainResult

SHIPPED_HEAD = "shipped_head"
METHODS = ("head", "clip_crops", "mask_pooling", "roi_pooling", "constant_token")
COLUMNS = ("top1", "top1_base", "top1_novel", "AP", "AP_base", "AP_novel")
NUM_OVERLAYS = 6
NUM_TO_TUNE_ON = 100  # training pictures on which the baselines' settings are chosen


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regionspot demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory for everything (%(default)s)"
    )
    parser.add_argument(
        "--train", type=int, default=3000, metavar="N", help="training pictures (%(default)s)"
    )
    parser.add_argument(
        "--val", type=int, default=500, metavar="N", help="held-out pictures (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=1200, metavar="N", help="training steps (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the pictures and of the training (%(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    began, config = time.perf_counter(), _config(arguments)
    _headline(
        1,
        f"Build the mini world: {arguments.train} pictures to learn from, {arguments.val} held out",
    )
    from regionspot.mini.dataset import build_dataset

    train_json, val_json = build_dataset(
        arguments.out / "data", arguments.train, arguments.val, arguments.seed
    )
    _headline(2, "Train the head on frozen SAM and CLIP")
    from regionspot.training.loop import train

    result = train(config, resume="auto")
    _headline(3, "Measure it on the held-out pictures, beside CLIP alone at its best")
    from regionspot.data.formats import load_dataset
    from regionspot.modeling.checkpoint import load_head
    from regionspot.modeling.presets import create_model
    from regionspot.modeling.regionspot import RegionSpot
    from regionspot.vocabulary import VocabularyEncoder

    training = load_dataset(train_json)
    dataset = load_dataset(val_json)
    shipped = create_model("regionspot_mini", device=config.device)
    model = RegionSpot(
        shipped.sam, shipped.clip, load_head(result.head_path).to(shipped.device), shipped.name
    )
    vocabularies = VocabularyEncoder(model.clip)
    vocabulary = vocabularies.encode(dataset.class_names)
    metrics = _evaluate(
        model, shipped, training, vocabularies.encode(training.class_names), dataset, vocabulary
    )
    _write_metrics(arguments.out / "metrics.json", metrics, result, dataset)
    print(f"\n{_table(metrics)}")
    _headline(4, "Recognise regions of held-out pictures, with the head that ships")
    overlays = _draw_overlays(shipped, dataset, vocabulary, arguments.out / "overlays")
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    print(f"\nDone in {minutes} min {seconds} s. Look at {overlays}\n")
    print(_next_steps(result.head_path, dataset))
    return 0


def _headline(number: int, text: str) -> None:
    print(f"\n[{number}/4] {text}", flush=True)


def _config(arguments: argparse.Namespace) -> TrainConfig:
    """configs/mini.yaml with fewer steps and everything under `arguments.out`.

    Raises:
        InputError: that directory holds a demo of other arguments.
    """
    from regionspot.config import differences_on_resume, load_config_of_run
    from regionspot.errors import InputError
    from regionspot.mini.recipe import head_recipe

    out = arguments.out
    config = head_recipe(out / "data" / "train.json", out, "train", arguments.seed, arguments.steps)
    earlier = out / "train" / "config.yaml"
    if earlier.is_file() and (
        changed := differences_on_resume(load_config_of_run(earlier), config)
    ):
        raise InputError(
            f"{out} holds a demo of other arguments ({', '.join(changed)}): choose another --out, "
            "or delete it"
        )
    return config


def _evaluate(
    model: RegionSpot,
    shipped: RegionSpot,
    training: CocoDataset,
    training_words: Vocabulary,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
) -> dict[str, dict[str, Any]]:
    from regionspot.evaluation.evaluator import evaluate_methods
    from regionspot.evaluation.methods import head_of
    from regionspot.evaluation.proposals import ground_truth_proposals
    from regionspot.evaluation.tuning import first_with_objects, tuned_methods

    to_tune_on = first_with_objects(training, NUM_TO_TUNE_ON)
    tuned = tuned_methods(model, to_tune_on, training_words, METHODS, batch_size=32)
    trained = replace(
        tuned.pop("head"), description=f"RegionSpot's head, trained on these {len(training.images)}"
    )
    methods = {
        SHIPPED_HEAD: head_of(shipped, "RegionSpot's head, as shipped"),
        "head": trained,
    } | tuned
    results = evaluate_methods(
        model, dataset, vocabulary, ground_truth_proposals(dataset), methods, batch_size=32
    )
    return {method: figures for method, (figures, _) in results.items()}


def _write_metrics(
    path: Path, metrics: dict[str, dict[str, Any]], result: TrainResult, dataset: CocoDataset
) -> None:
    summary = metrics | {
        "clip_crops_setting": metrics["clip_crops"]["protocol"]["method"],
        "train_seconds": round(result.train_seconds, 1),
        "feature_seconds": round(result.feature_seconds, 1),
        "train_images": result.images,
        "val_images": len(dataset.images),
        "regions": dataset.num_annotations,
    }
    write_output(path, json_bytes(summary))


def _table(metrics: dict[str, dict[str, Any]]) -> str:
    """What each method is, its top-1 accuracy and its AP."""
    from regionspot.cli.evaluate import number

    protocol = metrics["head"]["protocol"]
    names = {method: of_method["protocol"]["method"] for method, of_method in metrics.items()}
    width = max(map(len, names.values()))
    lines = [
        f"{protocol['regions']} regions of {protocol['images']} held-out pictures, "
        f"{protocol['classes']} names",
        "top-1: the best-scored name is the true one; base: in the head's training, novel: never",
        "",
        f"{'':<{width}}  {'top-1 accuracy, %':^21}  {'AP, %':^21}",
        f"{'':<{width}}  {'all':>6}{'base':>7}{'novel':>8}  {'all':>6}{'base':>7}{'novel':>8}",
    ]
    for method, of_method in metrics.items():
        cells = [number(of_method[name]) for name in COLUMNS]
        row = "{:>6}{:>7}{:>8}  {:>6}{:>7}{:>8}".format(*cells)
        lines.append(f"{names[method]:<{width}}  {row}")
    return "\n".join(lines)


def _draw_overlays(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, directory: Path
) -> Path:
    """An overlay for each of the first held-out pictures with four toys, or nearly so, and all on
    one sheet.
    """
    from PIL import Image

    from regionspot.images import read_image
    from regionspot.predictor import RegionPredictor
    from regionspot.visualize import draw_predictions

    directory.mkdir(parents=True, exist_ok=True)
    predictor, pictures = RegionPredictor(model), []
    typical = sorted(
        dataset.images, key=lambda image: abs(len(dataset.annotations_by_image[image.id]) - 4)
    )
    for record in typical[:NUM_OVERLAYS]:
        picture = read_image(dataset.image_path(record))
        annotations = dataset.annotations_by_image[record.id]
        found = predictor.set_image(picture).predict(
            boxes=[a.box for a in annotations], vocabulary=vocabulary
        )
        pictures.append(draw_predictions(picture, found, tint=False))
        Image.fromarray(pictures[-1]).save(directory / f"{Path(record.file_name).stem}.png")
        truth = [dataset.class_names[dataset.category_index[a.category_id]] for a in annotations]
        right = sum(
            found.class_names[i] == name for i, name in zip(found.class_ids, truth, strict=True)
        )
        print(f"  {record.file_name}: {right} of {len(truth)} regions named right")
    sheet = directory / "sheet.png"
    Image.fromarray(_sheet(pictures)).save(sheet)
    return sheet


def _sheet(pictures: Sequence[np.ndarray], columns: int = 3) -> np.ndarray:
    """Pictures of (H, W, 3), each in the middle of a cell as large as the largest, on white."""
    import numpy as np

    side_h, side_w = (max(picture.shape[axis] for picture in pictures) + 16 for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * side_h, columns * side_w, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top = index // columns * side_h + (side_h - picture.shape[0]) // 2
        left = index % columns * side_w + (side_w - picture.shape[1]) // 2
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def _next_steps(head: Path, dataset: CocoDataset) -> str:
    record = dataset.images[0]
    annotation = dataset.annotations_by_image[record.id][0]
    x0, y0, x1, y1 = (round(side) for side in annotation.box)
    name = dataset.class_names[dataset.category_index[annotation.category_id]]
    picture = shlex.quote(str(dataset.image_path(record)))
    return f"""What to try next:
  name a region in your own words (mini knows toys of its own world, not photographs) with the
  head trained here; without --head-weights, with the head that ships
    .venv/bin/regionspot predict {picture} --box {x0},{y0},{x1},{y1} \\
      --vocabulary "{name},plain green toy,red toy with blue stripes" \\
      --head-weights {shlex.quote(str(head))} --out overlay.png
  train on your own COCO or LVIS annotations with real weights: write their paths into this recipe
    .venv/bin/regionspot-train --config regionspot_bb_stage1.yaml --print-config
  see what works on this machine
    .venv/bin/regionspot doctor"""
