"""What `regionspot predict` and `regionspot-query` share: regions and vocabulary as options, tables, files written."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.errors import InputError

if TYPE_CHECKING:
    from regionspot.structures import RegionPredictions
    from regionspot.transforms import UInt8Array

OVERLAY_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def add_region_options(parser: argparse.ArgumentParser) -> Any:
    """Add --box and --point; returns their group."""
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
    return regions


def add_vocabulary_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add --vocabulary; `more` is another way to name one."""
    parser.add_argument(
        "--vocabulary",
        metavar="WORDS|FILE|NAME",
        required=True,
        help='"cat,dog", a .txt file with a name on each line, a COCO or LVIS .json, or one of mini, coco, imagenet'
        + more,
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --out, --json, --top-k and --no-masks."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="FILE", type=Path, help="the picture with its regions drawn (.png, .jpg, .webp)"
    )
    output.add_argument("--json", metavar="FILE", type=Path, help="boxes, classes, scores and masks (COCO RLE)")
    output.add_argument(
        "--top-k", metavar="K", type=int, default=5, help="classes to report of each region (default: 5)"
    )
    output.add_argument("--no-masks", action="store_true", help="do not draw masks: recognition does not need them")


def check_outputs(arguments: argparse.Namespace, image: Path) -> None:
    """Raises InputError for names and numbers that cannot be used."""
    if arguments.top_k < 1:
        raise InputError(f"--top-k must be 1 or more, not {arguments.top_k}")
    if arguments.out and arguments.out.suffix.lower() not in OVERLAY_FORMATS:
        raise InputError(f"--out {arguments.out}: its name must end in one of {', '.join(OVERLAY_FORMATS)}")
    for option, path in (("--out", arguments.out), ("--json", arguments.json)):
        if path and path.resolve() == image.resolve():
            raise InputError(f"{option} {path} would overwrite the picture itself: choose another name")


def region_table(predictions: RegionPredictions, title: str) -> str:
    rows = [("#", "box", "class", "score", "then")]
    for index, region in enumerate(predictions.to_json("")["regions"]):
        box = ",".join(f"{value:.0f}" for value in region["box"])
        then = ", ".join(f"{name} {score:.2f}" for name, score in region["top"][1:3])
        rows.append((str(index), box, region["class"], f"{region['score']:.2f}", then))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{title}, {len(predictions.class_names)} words", *lines])


def write_outputs(
    image: UInt8Array, file_name: str, predictions: RegionPredictions, json_path: Path | None, out: Path | None
) -> None:
    """The picture with its regions drawn, and the answer as JSON, where they are asked for."""
    from regionspot.files import write_atomically

    overlay = _encoded_overlay(image, predictions, out) if out else b""
    if json_path:
        write_atomically(json_path, json_text(predictions.to_json(file_name)).encode())
        print(f"wrote {json_path}")
    if out:
        write_atomically(out, overlay)
        print(f"wrote {out}")


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


def json_text(document: dict[str, Any]) -> str:
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
