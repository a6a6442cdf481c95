"""`regionspot-train --config FILE [key=value ...]`: train a head on COCO- or LVIS-format data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot-train",
        description="Train RegionSpot's head on the frozen SAM and CLIP. What they say of each image is computed once "
        "and kept in a cache. The head goes to OUTPUT_DIR/NAME/head.safetensors, beside checkpoints and logs.",
        epilog="example: regionspot-train --config regionspot/configs/mini.yaml datasets.0.annotations=train.json "
        "optimizer.learning_rate=5e-4 --resume auto",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that go over the file's")
    parser.add_argument("--config", metavar="FILE", required=True, help="a YAML file; see regionspot/configs/")
    parser.add_argument(
        "--resume", metavar="auto|CHECKPOINT", help="go on from the newest whole checkpoint, if any, or from this one"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and the size of the cache, then stop")
    parser.add_argument("--print-config", action="store_true", help="show the settings, all of them, then stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train; the exit status. Errors come as exceptions (see `regionspot.cli.main`)."""
    arguments = build_parser().parse_intermixed_args(argv)
    from regionspot.config import config_to_yaml, load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config_to_yaml(config), end="")
        return 0
    if arguments.dry_run:
        from regionspot.training.setup import Setup

        setup = Setup.from_config(config)
        print(setup.describe())
        print(setup.describe_caches())
        return 0
    from regionspot.training.loop import train

    train(config, resume=arguments.resume)
    return 0
