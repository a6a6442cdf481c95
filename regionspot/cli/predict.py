"""`regionspot predict IMAGE --box ... --vocabulary ...`: what the regions of a picture are."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.models import add_model_options, add_runtime_options, check_runtime, load_recognizer
from regionspot.errors import InputError

if TYPE_CHECKING:
    from regionspot.structures import BoolArray, RegionPredictions
    from regionspot.transforms import UInt8Array

EXAMPLE = 'regionspot predict photo.jpg --box 10,20,200,300 --vocabulary "cat,dog,coffee cup" --out overlay.png'
OVERLAY_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot predict",
        description="Recognise regions of a picture. All regions are looked at together, and see each other.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("image", metavar="IMAGE", type=Path, help="any picture; coordinates are pixels of it, upright")
    regions = parser.add_argument_group("regions (each may be given many times)")
    regions.add_argument(
        "--box",
        metavar="X0,Y0,X1,Y1",
        dest="boxes",
        action="append",
        default=[],
        type=_numbers("x0,y0,x1,y1"),
        help="a box; write --box=-5,0,... if it begins with a minus",
    )
    regions.add_argument(
        "--point", metavar="X,Y", dest="points", action="append", default=[], type=_numbers("x,y"), help="a click on it"
    )
    regions.add_argument(
        "--mask",
        metavar="FILE",
        dest="masks",
        action="append",
        default=[],
        type=Path,
        help="a picture of the same size, white on the region, black or transparent elsewhere",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="WORDS|FILE|NAME",
        required=True,
        help='"cat,dog", a .txt file with a name on each line, a COCO or LVIS .json, or one of mini, coco, imagenet',
    )
    add_model_options(parser)
    add_runtime_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="FILE", type=Path, help="the picture with its regions drawn (.png, .jpg, .webp)"
    )
    output.add_argument("--json", metavar="FILE", type=Path, help="boxes, classes, scores and masks (COCO RLE)")
    output.add_argument(
        "--top-k", metavar="K", type=int, default=5, help="classes to report of each region (default: 5)"
    )
    output.add_argument("--no-masks", action="store_true", help="do not draw masks: recognition does not need them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    from regionspot.predictor import RegionPredictor
    from regionspot.transforms import read_image
    from regionspot.vocabulary import parse_vocabulary

    names = parse_vocabulary(arguments.vocabulary)
    image = read_image(arguments.image)
    masks = _read_masks(arguments.masks)
    with load_recognizer(arguments) as model:
        predictor = RegionPredictor(model).set_image(image)
        predictions = predictor.predict(
            boxes=arguments.boxes,
            points=arguments.points,
            masks=masks,
            vocabulary=names,
            top_k=arguments.top_k,
            return_masks=not arguments.no_masks,
        )
    by = "" if arguments.runtime == "torch" else f" by {arguments.runtime}"
    print(_table(predictions, f"{arguments.image.name}: {image.shape[1]} x {image.shape[0]} pixels, {model.name}{by}"))
    _write(image, predictions, arguments)
    if len(names) == 1:
        print("note: among one word every region scores 1.00; give more words to choose from", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be refused before anything heavy is loaded."""
    if not (arguments.boxes or arguments.points or arguments.masks):
        raise InputError(f"no region was asked for: give --box, --point or --mask at least once\nexample: {EXAMPLE}")
    if arguments.top_k < 1:
        raise InputError(f"--top-k must be 1 or more, not {arguments.top_k}")
    if arguments.out and arguments.out.suffix.lower() not in OVERLAY_FORMATS:
        raise InputError(f"--out {arguments.out}: its name must end in one of {', '.join(OVERLAY_FORMATS)}")
    check_runtime(arguments)
    if arguments.masks and arguments.runtime != "torch":
        raise InputError(f"--mask needs PyTorch, not {arguments.runtime}: give a --box instead, or leave out --runtime")
    for option, path in (("--out", arguments.out), ("--json", arguments.json)):
        if path and path.resolve() == arguments.image.resolve():
            raise InputError(f"{option} {path} would overwrite the picture itself: choose another name")


def _read_masks(paths: Sequence[Path]) -> list[BoolArray]:
    from regionspot.transforms import read_mask

    masks = [read_mask(path) for path in paths]
    sizes = {f"{mask.shape[1]} x {mask.shape[0]}" for mask in masks}
    if len(sizes) > 1:
        raise InputError(f"the masks have different sizes, {', '.join(sorted(sizes))}: each must have the picture's")
    return masks


def _table(predictions: RegionPredictions, title: str) -> str:
    rows = [("#", "box", "class", "score", "then")]
    for index, region in enumerate(predictions.to_json("")["regions"]):
        box = ",".join(f"{value:.0f}" for value in region["box"])
        then = ", ".join(f"{name} {score:.2f}" for name, score in region["top"][1:3])
        rows.append((str(index), box, region["class"], f"{region['score']:.2f}", then))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{title}, {len(predictions.class_names)} words", *lines])


def _write(image: UInt8Array, predictions: RegionPredictions, arguments: argparse.Namespace) -> None:
    from regionspot.files import write_atomically

    overlay = _encoded_overlay(image, predictions, arguments.out) if arguments.out else b""
    if arguments.json:
        write_atomically(arguments.json, _json_text(predictions.to_json(arguments.image.name)).encode())
        print(f"wrote {arguments.json}")
    if arguments.out:
        write_atomically(arguments.out, overlay)
        print(f"wrote {arguments.out}")


def _encoded_overlay(image: UInt8Array, predictions: RegionPredictions, path: Path) -> bytes:
    """The drawn picture as a file in the format that its name asks for."""
    from PIL import Image

    from regionspot.visualize import draw_predictions

    overlay, encoded = Image.fromarray(draw_predictions(image, predictions)), io.BytesIO()
    file_format = OVERLAY_FORMATS[path.suffix.lower()]
    try:
        overlay.save(encoded, file_format, quality=92)
    except Exception as error:  # a format's limits, one that this Pillow lacks: its encoders raise almost anything
        raise InputError(
            f"--out {path}: the drawn picture, {overlay.width} x {overlay.height} pixels, cannot be written as "
            f"{file_format} ({error}): choose a name that ends in .png"
        ) from error
    return encoded.getvalue()


def _json_text(document: dict[str, Any]) -> str:
    """JSON with a region on each line."""
    regions = ",\n".join(json.dumps(region, ensure_ascii=False) for region in document["regions"])
    return f'{{"image": {json.dumps(document["image"], ensure_ascii=False)}, "regions": [\n{regions}\n]}}\n'


def _numbers(form: str) -> Callable[[str], tuple[float, ...]]:
    """Reads "10,20,200,300" as the numbers that `form` names."""
    count = form.count(",") + 1

    def read(text: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != count:
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}: {count} numbers with commas, no spaces")
        return numbers

    return read
