"""`python -m regionspot.benchmarks.mask_encoding`: SAM's mask logits to run-length masks, its way
and ours.

Its way is `Sam.postprocess_masks`, the threshold, and pycocotools. Both start from the same (n,
256, 256) logits and end with COCO's compressed text at the picture's size; every text is compared.
Each way runs in a process of its own, one after another; memory is the resident peak above the
process before its first mask.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.memory import PeakMemory
from regionspot.benchmarks.timing import median, repeat
from regionspot.child_process import run_module
from regionspot.errors import ArtifactError
from regionspot.files import write_atomically
from regionspot.logs import log_to
from regionspot.masks import encode_mask_logits
from regionspot.tables import text_table
from regionspot.threads import default_threads
from regionspot.transforms import SamTransform

logger = logging.getLogger(__name__)

FRAME, LOW_RES = 1024, 256
WAYS = ("segment_anything", "regionspot")

Logits = npt.NDArray[np.float32]
Encode = Callable[[Logits], list[str]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regionspot.benchmarks.mask_encoding", description=__doc__
    )
    parser.add_argument("--masks", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(1080, 1920), metavar=("H", "W"), help="of the picture"
    )
    parser.add_argument(
        "--threads", type=int, default=default_threads(), help="of both ways (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    # what a child process measures
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser


@log_to("stderr")
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.way:
        print(
            json.dumps(
                measure(arguments.way, arguments.masks, tuple(arguments.size), arguments.threads)
            )
        )
        return 0
    found = {way: _run(way, arguments) for way in WAYS}
    report = compare(found, arguments)
    print(format_report(report))
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(report, indent=2) + "\n").encode())
    return 0 if all(row["different"] == 0 for row in report["rows"]) else 1


def compare(
    found: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The report: a row for each kind of logits."""
    rows = []
    for kind in LOGITS:
        theirs, ours = (found[way][kind] for way in WAYS)
        rows.append(
            {
                "logits": kind,
                "segment_anything_s": theirs["seconds"],
                "regionspot_s": ours["seconds"],
                "speedup": theirs["seconds"] / ours["seconds"],
                "segment_anything_peak_mb": theirs["peak_mb"],
                "regionspot_peak_mb": ours["peak_mb"],
                "different": sum(
                    a != b for a, b in zip(theirs["counts"], ours["counts"], strict=True)
                ),
            }
        )
    what = {"masks": arguments.masks, "picture": list(arguments.size), "threads": arguments.threads}
    return {
        "benchmark": "mask_encoding",
        "rows": rows,
        "conditions": conditions(**what, statistic="median"),
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Returns a table for a terminal."""
    header = ("logits", "theirs s", "ours s", "faster", "theirs MiB", "ours MiB", "differ")
    rows = []
    for row in report["rows"]:
        seconds = [f"{row[f'{way}_s']:.3f}" for way in WAYS]
        peaks = [row[f"{way}_peak_mb"] for way in WAYS]
        memory = ["–" if peak is None else f"{peak:.0f}" for peak in peaks]
        rows.append(
            (row["logits"], *seconds, f"{row['speedup']:.1f}x", *memory, str(row["different"]))
        )
    return text_table(header, rows, right=range(1, len(header)))


def blobs(count: int) -> Logits:
    """Objects of all sizes with wavy outlines, as real masks are."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:LOW_RES, :LOW_RES].astype(np.float32) / LOW_RES
    logits = np.empty((count, LOW_RES, LOW_RES), np.float32)
    for index in range(count):
        centre, radius = rng.uniform(0.1, 0.9, 2), rng.uniform(0.03, 0.4)
        waves = sum(np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-30, 30, (6, 3)))
        logits[index] = 60 * (radius - np.hypot(x - centre[0], y - centre[1])) + waves
    return logits


def noise(count: int) -> Logits:
    """The worst there can be: no pixel is decided by its neighbourhood's sign."""
    return np.random.default_rng(0).normal(size=(count, LOW_RES, LOW_RES)).astype(np.float32)


LOGITS: dict[str, Callable[[int], Logits]] = {"blobs": blobs, "noise": noise}


def measure(way: str, count: int, size: tuple[int, int], threads: int) -> dict[str, dict[str, Any]]:
    """Kind of logits -> seconds, peak memory and texts of one way."""
    encode = {"segment_anything": encode_by_segment_anything, "regionspot": encode_by_regionspot}[
        way
    ](size, threads)
    found = {}
    for kind, draw in LOGITS.items():
        logits = draw(count)
        encode(logits[:1])  # warm-up
        memory = PeakMemory()
        memory.start()
        counts = encode(logits)
        peak = memory.peak_mb()
        seconds = repeat(partial(encode, logits))
        found[kind] = {"seconds": median(seconds), "peak_mb": peak, "counts": counts}
    return found


def encode_by_regionspot(size: tuple[int, int], threads: int) -> Encode:
    valid = SamTransform(FRAME).input_size(*size)
    return lambda logits: [
        rle["counts"] for rle in encode_mask_logits(logits, FRAME, valid, size, threads).rles
    ]


def encode_by_segment_anything(size: tuple[int, int], threads: int) -> Encode:
    import torch
    from pycocotools import mask as coco

    from regionspot.modeling.sam import Sam

    torch.set_num_threads(threads)
    sam = Sam.__new__(Sam)  # its postprocessing alone: it reads one attribute of the encoder
    torch.nn.Module.__init__(sam)
    sam.image_encoder = torch.nn.Module()
    sam.image_encoder.img_size = FRAME
    valid = SamTransform(FRAME).input_size(*size)

    @torch.inference_mode()
    def encode(logits: Logits) -> list[str]:
        masks = (
            sam.postprocess_masks(torch.from_numpy(logits)[:, None], valid, size)
            > sam.mask_threshold
        )
        pixels = masks[:, 0].numpy().view(np.uint8)
        return [coco.encode(np.asfortranarray(mask))["counts"].decode() for mask in pixels]

    return encode


def _run(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    logger.info(f"measuring {way}")
    height, width = arguments.size
    options = [
        "--masks",
        arguments.masks,
        "--size",
        height,
        width,
        "--threads",
        arguments.threads,
        "--way",
        way,
    ]
    child = run_module("regionspot.benchmarks.mask_encoding", *options)
    if child.failure:
        raise ArtifactError(f"{way} {child.failure}")
    return child.rows[-1]


if __name__ == "__main__":
    sys.exit(main())
