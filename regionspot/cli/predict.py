"""`regionspot predict IMAGE --box ... --vocabulary ...`: what the regions of a picture are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regionspot.cli.models import (
    add_model_options,
    add_runtime_options,
    check_runtime,
    load_recognizer,
)
from regionspot.cli.outputs import model_files
from regionspot.cli.paths import local_path
from regionspot.cli.regions import (
    add_clean_names_option,
    add_output_options,
    add_region_options,
    add_vocabulary_option,
    check_output_options,
    deliver,
)
from regionspot.errors import InputError

if TYPE_CHECKING:
    from regionspot.structures import BoolArray

EXAMPLE = (
    "regionspot predict photo.jpg --box 10,20,200,300 "
    '--vocabulary "cat,dog,coffee cup" --out overlay.png'
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot predict",
        description="Recognise regions of a picture. All regions are looked at together, and see "
        "each other.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument(
        "image",
        metavar="IMAGE",
        type=local_path,
        help="any picture; coordinates are pixels of it, upright",
    )
    regions = add_region_options(parser)
    regions.add_argument(
        "--mask",
        metavar="FILE",
        dest="masks",
        action="append",
        default=[],
        type=local_path,
        help="a picture of the same size, white on the region, black or transparent elsewhere",
    )
    add_vocabulary_option(parser)
    add_clean_names_option(parser)
    add_model_options(parser)
    add_runtime_options(parser)
    add_output_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    from regionspot.images import read_image
    from regionspot.predictor import RegionPredictor
    from regionspot.vocabulary import parse_vocabulary

    names = parse_vocabulary(arguments.vocabulary)
    image = read_image(arguments.image)
    masks = _read_masks(arguments.masks)
    with load_recognizer(arguments) as model:
        predictor = RegionPredictor(model, clean_coco_suffixes=arguments.clean_names == "coco")
        predictions = predictor.predict(
            image,
            boxes=arguments.boxes,
            points=arguments.points,
            masks=masks,
            vocabulary=names,
            top_k=arguments.top_k,
            return_masks=not arguments.no_masks,
        )
    pipeline = predictor.pipeline
    by = "" if pipeline.runtime == "torch" else f" by {pipeline.runtime}"
    in_half = "" if pipeline.precision == "fp32" else f" in {pipeline.precision}"
    title = f"{image.shape[1]} x {image.shape[0]} pixels, {model.name}{by}{in_half}"
    deliver(image, predictions, arguments, title)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be refused before anything heavy is loaded."""
    if not (arguments.boxes or arguments.points or arguments.masks):
        raise InputError(
            "no region was asked for: give --box, --point or --mask at least once\nexample: "
            f"{EXAMPLE}"
        )
    inputs = {
        "the picture itself": arguments.image,
        "a mask": arguments.masks,
        **model_files(arguments),
    }
    check_output_options(arguments, inputs)
    check_runtime(arguments)


def _read_masks(paths: Sequence[Path]) -> list[BoolArray]:
    from regionspot.images import read_mask

    masks = [read_mask(path) for path in paths]
    sizes = {f"{mask.shape[1]} x {mask.shape[0]}" for mask in masks}
    if len(sizes) > 1:
        raise InputError(
            f"the masks have different sizes, {', '.join(sorted(sizes))}: each must have the "
            "picture's"
        )
    return masks
