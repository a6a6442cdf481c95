"""`regionspot mini`: make the mini world's pictures, or train its SAM and CLIP again."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from regionspot.mini.pretrain_clip import ClipRecipe
    from regionspot.mini.pretrain_sam import SamRecipe

Recipe = TypeVar("Recipe", "SamRecipe", "ClipRecipe")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regionspot mini", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    _add_build(actions)
    _add_pretrain(actions)
    return parser


def _add_build(actions: Any) -> None:
    build = actions.add_parser("build", help="write pictures and LVIS-format annotations")
    build.add_argument(
        "--out", type=Path, required=True, help="directory for the annotations and pictures"
    )
    build.add_argument(
        "--train", type=int, default=9000, metavar="N", help="training pictures (%(default)s)"
    )
    build.add_argument(
        "--val", type=int, default=1000, metavar="N", help="validation pictures (%(default)s)"
    )
    build.add_argument(
        "--crowds",
        type=int,
        default=0,
        metavar="N",
        help="pictures of up to 100 small toys (%(default)s)",
    )
    build.add_argument(
        "--long-tail",
        action="store_true",
        help="frequent, common and rare categories in training, not all alike",
    )
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")


def _add_pretrain(actions: Any) -> None:
    pretrain = actions.add_parser("pretrain", help="train the small SAM or CLIP on the mini world")
    pretrain.add_argument("tower", choices=("sam", "clip"))
    pretrain.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of the recipe, such as steps=100; may be given many times",
    )
    pretrain.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory for the weights, and a checkpoint that a killed run goes on from",
    )
    pretrain.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="DIR",
        help="begin with these weights (default: random ones)",
    )
    pretrain.add_argument(
        "--pool", type=Path, default=Path("runs/mini-pool"), help="rendered pictures (%(default)s)"
    )
    pretrain.add_argument("--threads", type=int, default=2)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return _build(arguments) if arguments.action == "build" else _pretrain(arguments)


def _build(arguments: argparse.Namespace) -> int:
    from regionspot.mini.dataset import build_dataset

    paths = build_dataset(
        arguments.out,
        arguments.train,
        arguments.val,
        arguments.seed,
        arguments.workers,
        num_crowds=arguments.crowds,
        long_tail=arguments.long_tail,
    )
    print("\n".join(map(str, paths)))
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    import torch

    from regionspot.mini import pretrain_clip, pretrain_sam, shipped

    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    # a run that was killed goes on from it
    checkpoint = arguments.out / f"{arguments.tower}-checkpoint.pt"
    if arguments.tower == "sam":
        sam_recipe = _with_overrides(pretrain_sam.SamRecipe(), arguments.overrides)
        path = shipped.save_sam(
            pretrain_sam.train(arguments.pool, sam_recipe, checkpoint, arguments.start),
            arguments.out,
        )
    else:
        clip_recipe = _with_overrides(pretrain_clip.ClipRecipe(), arguments.overrides)
        clip, token_ids = pretrain_clip.train(
            arguments.pool, clip_recipe, checkpoint, arguments.start
        )
        path = shipped.save_clip(clip, token_ids, arguments.out)
    print(path)
    return 0


def _with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    from regionspot.errors import InputError

    kinds = {field.name: type(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
    changes = {}
    for override in overrides:
        name, _, value = override.partition("=")
        try:
            changes[name] = kinds[name](value)
        except (KeyError, ValueError) as error:
            fields = ", ".join(kinds)
            raise InputError(
                f"{override!r} sets no field: write --set KEY=NUMBER with one of {fields}"
            ) from error
    return dataclasses.replace(recipe, **changes)
