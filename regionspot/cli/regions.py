"""What `regionspot predict` and `regionspot-query` share: regions and vocabulary as options,
tables, files written.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.outputs import check_outputs, is_stdout, table_stream, write_output
from regionspot.errors import InputError, plain_text, visible
from regionspot.tables import text_table

if TYPE_CHECKING:
    from regionspot.structures import RegionPredictions, UInt8Array

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
        "--point",
        metavar="X,Y",
        dest="points",
        action="append",
        default=[],
        type=_numbers("x,y"),
        help="a click on it",
    )
    return regions


def add_vocabulary_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add --vocabulary; `more` is another way to name one."""
    parser.add_argument(
        "--vocabulary",
        metavar="WORDS|FILE|NAME",
        required=True,
        help='"cat,dog", a text file with a name on each line, a CSV file, a COCO or LVIS .json, a '
        "YOLO data.yaml, or "
        "one of mini, coco, imagenet" + more,
    )


def add_clean_names_option(parser: argparse.ArgumentParser) -> None:
    """Add --clean-names."""
    parser.add_argument(
        "--clean-names",
        choices=("none", "coco"),
        default="none",
        help="coco: leave the suffixes -other, -merged and -stuff of COCO's names out, as "
        "datasets.*.clean_names in training (default: %(default)s)",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --out, --json, --top-k and --no-masks."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the picture with its regions drawn (.png, .jpg, .webp)",
    )
    output.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        help="boxes, classes, scores and masks (COCO RLE); - is standard output",
    )
    output.add_argument(
        "--top-k",
        metavar="K",
        type=int,
        default=5,
        help="classes to report of each region (default: 5)",
    )
    output.add_argument(
        "--font",
        metavar="FILE",
        type=Path,
        help="draw labels in this font (default: one that has their letters)",
    )
    output.add_argument(
        "--no-masks", action="store_true", help="do not draw masks: recognition does not need them"
    )


def check_output_options(arguments: argparse.Namespace, inputs: Mapping[str, Any]) -> None:
    """Refuse values of the options of `add_output_options` that cannot be used.

    Args:
        inputs: as of `regionspot.cli.outputs.check_outputs`; the vocabulary is added.

    Raises:
        InputError: numbers or names that cannot be used, outputs that would overwrite an input or
            each other.
    """
    if arguments.top_k < 1:
        raise InputError(f"--top-k must be 1 or more, not {arguments.top_k}")
    if (
        arguments.out
        and _is_plain(arguments.out)
        and arguments.out.suffix.lower() not in OVERLAY_FORMATS
    ):
        raise InputError(
            f"--out {arguments.out}: its name must end in one of {', '.join(OVERLAY_FORMATS)}"
        )
    outputs = {"--out": arguments.out, "--json": arguments.json}
    check_outputs(
        outputs, {**inputs, "the vocabulary": arguments.vocabulary, "--font": arguments.font}
    )
    if arguments.font:
        from regionspot.fonts import read_font

        read_font(arguments.font)  # before any work


def region_table(predictions: RegionPredictions, title: str) -> str:
    rows = []
    for index, region in enumerate(predictions.to_json("")["regions"]):
        box = ",".join(f"{value:.0f}" for value in region["box"])
        then = ", ".join(f"{visible(name)} {score:.2f}" for name, score in region["top"][1:3])
        rows.append((str(index), box, visible(region["class"]), f"{region['score']:.2f}", then))
    table = text_table(("#", "box", "class", "score", "then"), rows)
    return f"{title}, {len(predictions.class_names)} words\n{table}"


def deliver(
    image: UInt8Array | None,
    predictions: RegionPredictions,
    arguments: argparse.Namespace,
    title: str,
) -> None:
    """Write what the options of `add_output_options` ask for, then print the table: files first,
    whoever reads it.

    Args:
        image: (H, W, 3) uint8 RGB, for --out.
    """
    overlay = b""
    if arguments.out:
        assert image is not None
        overlay = _encoded_overlay(image, predictions, arguments.out, arguments.font)
    stream = table_stream(arguments.json, arguments.out)
    written = []
    if arguments.json:
        document = predictions.to_json(plain_text(arguments.image.name))
        write_output(arguments.json, json_text(document).encode("utf-8", "backslashreplace"))
        written.append(arguments.json)
    if arguments.out:
        write_output(arguments.out, overlay)
        written.append(arguments.out)
    name = visible(plain_text(arguments.image.name))
    print(region_table(predictions, f"{name}: {title}"), file=stream)
    for path in written:
        if not is_stdout(path):
            print(f"wrote {visible(plain_text(path))}", file=stream)
    if len(predictions.class_names) == 1:
        print(
            "note: among one word every region scores 1.00; give more words to choose from",
            file=sys.stderr,
        )


def _is_plain(path: Path) -> bool:
    """Whether a path is, or will be, a regular file: others need no name with a format."""
    return not is_stdout(path) and (os.path.isfile(path) or not os.path.exists(path))


def _encoded_overlay(
    image: UInt8Array, predictions: RegionPredictions, path: Path, font: Path | None
) -> bytes:
    """The drawn picture as a file in the format that its name asks for; PNG for standard output and
    devices.
    """
    from PIL import Image

    from regionspot.visualize import draw_predictions

    overlay = Image.fromarray(draw_predictions(image, predictions, font=font))
    encoded = io.BytesIO()
    file_format = OVERLAY_FORMATS.get(path.suffix.lower(), "PNG")
    try:
        overlay.save(encoded, file_format, quality=92)
    except (
        Exception
    ) as error:  # a format's limits, one that this Pillow lacks: its encoders raise almost anything
        raise InputError(
            f"--out {path}: the drawn picture, {overlay.width} x {overlay.height} pixels, cannot "
            f"be written as {file_format} ({error}): choose a name that ends in .png"
        ) from error
    return encoded.getvalue()


def json_text(document: dict[str, Any]) -> str:
    """JSON with a region on each line."""
    regions = ",\n".join(json.dumps(region, ensure_ascii=False) for region in document["regions"])
    image = json.dumps(document["image"], ensure_ascii=False)
    return f'{{"image": {image}, "regions": [\n{regions}\n]}}\n'


def _numbers(form: str) -> Callable[[str], tuple[float, ...]]:
    """Reads "10,20,200,300" as the numbers that `form` names."""
    count = form.count(",") + 1

    def read(text: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != count:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {form}: {count} numbers with commas, no spaces"
            )
        return numbers

    return read
