"""`regionspot convert IN.pth OUT.safetensors`: the authors' head checkpoint as one of ours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from regionspot.cli.outputs import check_outputs


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot convert",
        description="Import a checkpoint of RegionSpot's authors: takes the head out, checks "
        "every key and shape. The file is read as weights alone; one that would run "
        "code is refused.",
    )
    parser.add_argument(
        "source",
        metavar="IN.pth",
        help="the authors' checkpoint, with or without SAM and CLIP inside",
    )
    parser.add_argument("target", metavar="OUT.safetensors", help="where the head goes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_outputs({"OUT": arguments.target}, {"the checkpoint": arguments.source})
    from regionspot.modeling.checkpoint import convert_official

    convert_official(arguments.source, arguments.target)
    print(f"wrote {arguments.target}; use it as --head-weights {arguments.target}")
    return 0
