"""Average precision of every runtime and precision on the same pictures and regions, and how far
each is from PyTorch in single precision: dAP in points, the share of regions whose best class
agrees, and the classes that moved most.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from regionspot.cli.benchmark.options import (
    RANDOM_SEED,
    add_data_options,
    add_target_options,
    annotation_file,
    chosen_targets,
    model_arguments,
)
from regionspot.errors import InputError

if TYPE_CHECKING:
    from regionspot.benchmarks.targets import Target
    from regionspot.modeling.regionspot import RegionSpot
    from regionspot.runtime.pipeline import RegionPipeline

SUMMARY = "average precision of each runtime and precision, and its distance to PyTorch"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_target_options(parser)
    add_data_options(parser, count=200)
    parser.add_argument(
        "--proposals", default="gt", metavar="gt|FILE", help="ground-truth boxes, or a detector's"
    )
    parser.add_argument(
        "--rules", choices=("lvis", "coco"), default="lvis", help="default: %(default)s"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="images at a time (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report.

    Raises:
        InputError, ArtifactError: data, a target or artefacts that cannot be used.
    """
    from regionspot.benchmarks.accuracy import Setup, measure
    from regionspot.benchmarks.targets import REFERENCE, open_target
    from regionspot.data.formats import load_dataset
    from regionspot.evaluation.proposals import ground_truth_proposals, load_proposals

    chosen = chosen_targets(arguments)
    weights = model_arguments(arguments, chosen.model)
    if weights.get("random_weights") == RANDOM_SEED and arguments.random_weights is None:
        raise InputError(
            f"accuracy needs {chosen.model}'s weights: name them with --sam-weights, "
            "--clip-weights and --head-weights"
        )
    if not arguments.artifacts and [target.name for target in chosen.targets] == [REFERENCE]:
        raise InputError(
            "there is nothing to compare PyTorch with: name a directory of artefacts with "
            "--artifacts"
        )
    # it comes first where it is asked for
    targets = sorted(chosen.targets, key=lambda target: target.name != REFERENCE)

    def open_it(target: Target) -> AbstractContextManager[RegionSpot | RegionPipeline]:
        return open_target(
            target, weights, arguments.artifacts, arguments.device, arguments.threads
        )

    with annotation_file(arguments, "val") as (path, source):
        dataset = load_dataset(path, arguments.images)
        proposals = (
            ground_truth_proposals(dataset)
            if arguments.proposals == "gt"
            else load_proposals(arguments.proposals, dataset)
        )
        setup = Setup(
            targets, open_it, dataset, proposals, source, arguments.rules, arguments.batch_size
        )
        return measure(setup)
