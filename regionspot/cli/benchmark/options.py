"""Options that several kinds of benchmarks share."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.models import DEFAULT_MODEL, WEIGHT_OPTIONS, add_model_options, check_threads
from regionspot.errors import InputError

if TYPE_CHECKING:
    from regionspot.benchmarks.targets import Target

RANDOM_SEED = 0


@dataclass(frozen=True)
class Selection:
    """What to measure: the preset's name, its targets, and "cpu" or "cuda", where they work."""

    model: str
    targets: Sequence[Target]
    device: str


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add the model's options, --artifacts, --targets and --threads."""
    add_model_options(parser)
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--artifacts", metavar="DIR", help="from regionspot-export (default: PyTorch alone)"
    )
    what.add_argument(
        "--targets",
        default="all",
        metavar="LIST",
        help="such as torch_fp32,openvino_int8 (default: PyTorch, and all that was exported and "
        "runs here)",
    )
    what.add_argument(
        "--threads", metavar="N", type=int, help="on the CPU (default: its physical cores)"
    )


def chosen_targets(arguments: argparse.Namespace) -> Selection:
    """What the options of `add_target_options` name. With artefacts and no --model, the model is
    theirs.

    Raises:
        InputError, ArtifactError: a target that there is not, artefacts that cannot be read or are
            of another model.
    """
    check_threads(arguments)
    from regionspot.benchmarks.targets import available_targets, choose_targets
    from regionspot.modeling.devices import resolve_device
    from regionspot.runtime.artifacts import Manifest

    manifest = None if arguments.artifacts is None else Manifest.load(arguments.artifacts)
    model = arguments.model
    if manifest is not None and manifest.model.name != model:
        if model != DEFAULT_MODEL:
            raise InputError(
                f"the artefacts in {arguments.artifacts} are of {manifest.model.name}, not of "
                f"{model}"
            )
        model = manifest.model.name
    device = resolve_device(arguments.device).type
    return Selection(
        model,
        choose_targets(arguments.targets, available_targets(manifest, device == "cuda")),
        device,
    )


def model_arguments(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """Arguments of `create_model`. A full-size model without weights has random ones: its speed is
    the same.
    """
    given = {option: getattr(arguments, option) for option in WEIGHT_OPTIONS}
    if model != DEFAULT_MODEL and all(value is None for value in given.values()):
        given["random_weights"] = RANDOM_SEED
    return {"name": model, **given}


def add_data_options(parser: argparse.ArgumentParser, count: int) -> None:
    """Add --data, --images and --count, the latter of pictures of the mini world where no data are
    named.
    """
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="JSON",
        help="annotations in COCO or LVIS format (default: of the mini world)",
    )
    data.add_argument(
        "--images", metavar="DIR", help="where its images are (default: beside the annotations)"
    )
    data.add_argument(
        "--count",
        type=int,
        default=count,
        metavar="N",
        help="pictures of the mini world (default: %(default)s)",
    )


@contextmanager
def annotation_file(arguments: argparse.Namespace, split: str) -> Iterator[tuple[Path, str]]:
    """The file that the options of `add_data_options` name, or one that lives as long as this, and
    what it is in words.

    Args:
        split: of the mini world, "train" or "val".

    Raises:
        InputError: no pictures are asked for.
    """
    if arguments.data:
        yield Path(arguments.data), Path(arguments.data).name
        return
    if arguments.count < 1:
        raise InputError(f"--count must be 1 or more, not {arguments.count}")
    from regionspot.mini.dataset import build_dataset

    sizes = (arguments.count, 1) if split == "train" else (1, arguments.count)
    with tempfile.TemporaryDirectory() as name:
        paths = dict(zip(("train", "val"), build_dataset(Path(name), *sizes), strict=True))
        yield paths[split], f"mini {split}, {arguments.count} pictures"
