"""Options that several kinds of benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regionspot.cli.models import DEFAULT_MODEL, WEIGHT_OPTIONS, add_model_options, check_threads
from regionspot.errors import InputError

if TYPE_CHECKING:
    from regionspot.benchmarks.targets import Target

RANDOM_SEED = 0


@dataclass(frozen=True)
class Chosen:
    """What to measure: the preset's name, its targets, and "cpu" or "cuda", where they work."""

    model: str
    targets: Sequence[Target]
    device: str


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add the model's options, --artifacts, --targets and --threads."""
    add_model_options(parser)
    what = parser.add_argument_group("what to measure")
    what.add_argument("--artifacts", metavar="DIR", help="from regionspot-export (default: PyTorch alone)")
    what.add_argument(
        "--targets",
        default="all",
        metavar="LIST",
        help="such as torch_fp32,openvino_int8 (default: PyTorch, and all that was exported and runs here)",
    )
    what.add_argument("--threads", metavar="N", type=int, help="on the CPU (default: its physical cores)")


def chosen_targets(arguments: argparse.Namespace) -> Chosen:
    """What the options of `add_target_options` name. With artefacts and no --model, the model is theirs.

    Raises:
        InputError, ArtifactError: a target that there is not, artefacts that cannot be read or are of another model.
    """
    check_threads(arguments)
    from regionspot.benchmarks.targets import available_targets, choose_targets
    from regionspot.modeling.devices import resolve_device
    from regionspot.runtime.artifacts import Manifest

    manifest = None if arguments.artifacts is None else Manifest.load(arguments.artifacts)
    model = arguments.model
    if manifest is not None and manifest.model.name != model:
        if model != DEFAULT_MODEL:
            raise InputError(f"the artefacts in {arguments.artifacts} are of {manifest.model.name}, not of {model}")
        model = manifest.model.name
    device = resolve_device(arguments.device).type
    return Chosen(model, choose_targets(arguments.targets, available_targets(manifest, device == "cuda")), device)


def model_arguments(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """Arguments of `create_model`. A full-size model without weights has random ones: its speed is the same."""
    given = {option: getattr(arguments, option) for option in WEIGHT_OPTIONS}
    if model != DEFAULT_MODEL and all(value is None for value in given.values()):
        given["random_weights"] = RANDOM_SEED
    return {"name": model, **given}


def counts(option: str, text: str) -> list[int]:
    """From "1,10,100", in increasing order. Raises InputError for anything but positive numbers."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise InputError(f"{option} {text!r} is not a list of positive numbers such as 1,10,100")
    return numbers
