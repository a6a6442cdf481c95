"""Training throughput: pictures a second of extracting features, and of steps from cached features,
with CLIP's maps computed anew in each step as in the paper's recipe, and with nothing cached.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from regionspot.cli.benchmark.options import (
    add_data_options,
    add_target_options,
    annotation_file,
    chosen_targets,
    model_arguments,
)
from regionspot.cli.models import DEFAULT_MODEL
from regionspot.errors import InputError

SUMMARY = "training throughput, from cached features and without"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_target_options(parser)
    add_data_options(parser, count=128)
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="pictures of a step (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=8, metavar="N", help="of each measurement (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report.

    Raises:
        InputError, ArtifactError: data, weights or artefacts that cannot be used.
    """
    if min(arguments.count, arguments.batch_size, arguments.steps) < 1:
        raise InputError("--count, --batch-size and --steps must be 1 or more")
    from regionspot.benchmarks.training import Request, measure
    from regionspot.config import DatasetConfig, ModelConfig, TrainConfig, load_config
    from regionspot.modeling.presets import create_backbones

    chosen = chosen_targets(arguments)
    weights = model_arguments(arguments, chosen.model)
    own = Path(__file__).parents[2] / "configs" / "mini.yaml"
    with annotation_file(arguments, "train") as (path, _):
        if chosen.model == DEFAULT_MODEL:
            config = load_config(own, [f"datasets.0.annotations={path}"])
        else:
            config = TrainConfig(
                (DatasetConfig("data", str(path)),), model=ModelConfig(chosen.model)
            )
        config = replace(config, batch_size=arguments.batch_size, device=arguments.device)
        towers = {name: weights[name] for name in ("sam_weights", "clip_weights", "random_weights")}
        return measure(
            Request(
                config,
                create_backbones(chosen.model, **towers),
                path,
                arguments.images,
                arguments.steps,
                arguments.artifacts,
                [
                    (target.runtime, target.precision)
                    for target in chosen.targets
                    if not target.in_torch
                ],
            )
        )
