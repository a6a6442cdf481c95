"""`regionspot-train --config FILE [key=value ...]`: trains a head on COCO- or LVIS-format data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from regionspot.config import config_to_yaml, load_config, packaged_configs

if TYPE_CHECKING:
    from regionspot.data.feature_cache import FeatureCache


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot-train",
        description="Train RegionSpot's head on the frozen SAM and CLIP. What they say of each "
        "image is computed once and kept in a cache. The head goes to "
        "OUTPUT_DIR/NAME/head.safetensors, beside checkpoints and logs.",
        epilog="example: regionspot-train --config mini.yaml datasets.0.annotations=train.json "
        "optimizer.learning_rate=5e-4 --resume auto",
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings that go over the file's"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        required=True,
        help="a YAML file, or one that comes with regionspot, by its name: "
        f"{', '.join(packaged_configs())}",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|CHECKPOINT",
        help="go on from the newest whole checkpoint, if any, or from this one",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the plan and the size of the cache, then stop"
    )
    parser.add_argument(
        "--delete-unused",
        action="store_true",
        help="delete cached features of earlier states of these data sets (and of others with "
        "their names) and list them, then stop",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show the settings, all of them, then stop"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train; the exit status. Errors come as exceptions (see `regionspot.cli.main`)."""
    arguments = build_parser().parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config_to_yaml(config), end="")
        return 0
    if arguments.dry_run or arguments.delete_unused:
        from regionspot.training.setup import Setup

        setup = Setup.from_config(config)
        if arguments.delete_unused:
            print(_delete_unused(setup.caches))
        else:
            print(setup.describe())
            print(setup.describe_caches())
        return 0
    from regionspot.training.loop import train

    train(config, resume=arguments.resume)
    return 0


def _delete_unused(caches: Sequence[FeatureCache]) -> str:
    from regionspot.data.feature_cache import delete_unused

    deleted = delete_unused(caches)
    return "\n".join(
        [*map(str, deleted), f"deleted {len(deleted)} files that these data sets do not use"]
    )
