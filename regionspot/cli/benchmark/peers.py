"""RegionSpot beside the research pipeline, CLIP on box crops, Grounding DINO and OWLv2: time,
memory and arithmetic, of labels only and with masks. All ways get the same picture, boxes and
words, and those of RegionSpot the same weights; each runs in a process of its own. Weights are
random where no files are named: they cost the same.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from regionspot.cli.models import DEFAULT_MODEL, WEIGHT_OPTIONS, add_model_options, check_threads
from regionspot.errors import InputError

SUMMARY = "RegionSpot beside the research pipeline and other ways to name regions"
MODEL = "regionspot_bl"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what to measure, and of which model."""
    add_model_options(parser)
    parser.set_defaults(model=MODEL, device="cpu")
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--artifacts", metavar="DIR", help="also these graphs, exported from the same weights"
    )
    what.add_argument(
        "--peers",
        default="all",
        metavar="LIST",
        help="of research, clip_crops, grounding_dino, owlv2, ours, or a runtime such as "
        "onnxruntime_fp32 (default: %(default)s)",
    )
    what.add_argument(
        "--regions", default="1,10,100,300", metavar="LIST", help="how many (default: %(default)s)"
    )
    what.add_argument(
        "--picture",
        default="1920x1080",
        metavar="WxH|FILE",
        help="a generated one, or yours (default: %(default)s)",
    )
    what.add_argument(
        "--words", type=int, default=80, metavar="N", help="to choose from (default: %(default)s)"
    )
    what.add_argument(
        "--threads", type=int, metavar="N", help="on the CPU (default: its physical cores)"
    )
    what.add_argument(
        "--repetitions",
        type=int,
        metavar="N",
        help="of each (default: one of what takes over 20 s, else 3 or more)",
    )
    what.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of boxes, words and the picture (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and say what is being measured on stderr; the report.

    Raises:
        InputError: options that name nothing that there is, or artefacts of other weights.
        ArtifactError: damaged artefacts or weights.
    """
    regions = _check(arguments)
    from regionspot.benchmarks.peers import Setup, measure
    from regionspot.threads import default_threads

    model = {
        "name": arguments.model,
        **{option: getattr(arguments, option) for option in WEIGHT_OPTIONS},
    }
    if arguments.model != DEFAULT_MODEL and not any(
        value is not None for value in list(model.values())[1:]
    ):
        model["random_weights"] = 0
    return measure(
        Setup(
            model=model,
            weights=_weights(model),
            artifacts=arguments.artifacts,
            export_command=_export_command(model, arguments.artifacts),
            regions=regions,
            picture=arguments.picture,
            peers=arguments.peers,
            threads=arguments.threads or default_threads(),
            repetitions=arguments.repetitions,
            words=arguments.words,
            seed=arguments.seed,
        )
    )


def _check(arguments: argparse.Namespace) -> list[int]:
    """The numbers of regions, increasing. Raises InputError for what is impossible whatever there
    is.
    """
    from regionspot.benchmarks.counts import counts

    check_threads(arguments)
    if arguments.device != "cpu":
        raise InputError(
            f"--device {arguments.device}: peers compares time and resident memory on the CPU; "
            "leave it out"
        )
    for option in ("words", "repetitions"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option} must be 1 or more, not {value}")
    if arguments.seed < 0:
        raise InputError(f"--seed must be 0 or more, not {arguments.seed}")
    return counts("--regions", arguments.regions)


def _weights(model: dict[str, Any]) -> str:
    """Where they come from, without the folders."""
    files = [
        Path(model[option]).name for option in WEIGHT_OPTIONS[:-1] if model[option] is not None
    ]
    seed = None if model["random_weights"] is None else f"random, seed {model['random_weights']}"
    return "; ".join([*files, *filter(None, [seed])]) or "the package's own"


def _export_command(model: dict[str, Any], directory: str | None) -> str:
    words = ["regionspot-export", "--model", model["name"]]
    for option in WEIGHT_OPTIONS:
        if model[option] is not None:
            words += [f"--{option.replace('_', '-')}", str(model[option])]
    if model["name"] != DEFAULT_MODEL and model["random_weights"] is None:
        words += ["--calibration", "IMAGES"]  # int8 of real weights needs some
    return shlex.join(
        [
            *words,
            "--out",
            directory or "artifacts",
            "--onnx",
            "--openvino",
            "--precision",
            "fp32,int8",
        ]
    )
