"""The options that name a model, the same for every command that loads one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regionspot.modeling.regionspot import RegionSpot


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, its weight files and --device."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", default="regionspot_mini", help="a preset (default: %(default)s)")
    model.add_argument("--head-weights", metavar="FILE", help="from regionspot-train or `regionspot convert`")
    model.add_argument("--sam-weights", metavar="FILE", help="SAM's official .pth; regionspot_mini brings its own")
    model.add_argument("--clip-weights", metavar="FILE", help="OpenAI's .pt or open_clip's file; likewise")
    model.add_argument("--random-weights", metavar="SEED", type=int, help="in place of files: to try sizes and speed")
    model.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if any)")


def load_model(arguments: argparse.Namespace) -> RegionSpot:
    """The model that the options name, on its device.

    Raises:
        InputError, ArtifactError: an unknown preset or device, a missing, damaged or foreign file.
    """
    from regionspot.modeling.devices import resolve_device
    from regionspot.modeling.presets import create_model

    device = resolve_device(arguments.device)
    model = create_model(
        arguments.model,
        sam_weights=arguments.sam_weights,
        clip_weights=arguments.clip_weights,
        head_weights=arguments.head_weights,
        random_weights=arguments.random_weights,
    )
    return model.to(device)
