"""The options that name a model and what runs it, the same for every command that loads one."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

from regionspot.cli.servers import CREDENTIALS, URL_HELP, add_credential_options, tls_files
from regionspot.config import Precision
from regionspot.errors import InputError
from regionspot.runtime.formats import export_option, model_runtimes
from regionspot.runtime.tolerance import QUANTIZED

if TYPE_CHECKING:
    from regionspot.modeling.regionspot import RegionSpot
    from regionspot.runtime.pipeline import RegionPipeline

DEFAULT_MODEL = "regionspot_mini"
MAX_THREADS = 1024
TORCH_PRECISIONS = ("fp32", "bf16", "fp16")
TRITON = "triton"
"""The runtime that is a server, see `regionspot.serving.triton.pipeline_from_triton`."""

PRECISION_HELP = (
    "of the artefacts (default: fp32 on a CPU, fp16 on a GPU), or what torch works in: fp32 "
    "(default), bf16, fp16"
)

WEIGHT_OPTIONS = ("head_weights", "sam_weights", "clip_weights", "random_weights")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, its weight files and --device."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="NAME", default=DEFAULT_MODEL, help="a preset (default: %(default)s)"
    )
    model.add_argument(
        "--head-weights", metavar="FILE", help="from regionspot-train or `regionspot convert`"
    )
    model.add_argument(
        "--sam-weights", metavar="FILE", help="SAM's official .pth; regionspot_mini brings its own"
    )
    model.add_argument(
        "--clip-weights", metavar="FILE", help="OpenAI's .pt or open_clip's file; likewise"
    )
    model.add_argument(
        "--random-weights",
        metavar="SEED",
        type=int,
        help="in place of files: to try sizes and speed",
    )
    model.add_argument(
        "--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if any)"
    )


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Add --runtime, --artifacts, --precision, --threads, --url and what a server wants."""
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument(
        "--runtime",
        choices=("torch", *model_runtimes(), TRITON),
        default="torch",
        help="what runs the model (default: %(default)s)",
    )
    runtime.add_argument(
        "--artifacts",
        metavar="DIR",
        help="from regionspot-export: takes the weights' place for all but torch",
    )
    runtime.add_argument("--precision", choices=get_args(Precision), help=PRECISION_HELP)
    runtime.add_argument(
        "--threads", metavar="N", type=int, help="on the CPU (default: its physical cores)"
    )
    runtime.add_argument("--url", metavar="URL", help=f"of triton: {URL_HELP}")
    add_credential_options(runtime)


def load_model(arguments: argparse.Namespace, dtype: str | None = None) -> RegionSpot:
    """Makes the model that the options name, on its device.

    Args:
        dtype: as `create_model` takes it.

    Raises:
        InputError, ArtifactError: an unknown preset or device, a missing, damaged or foreign file.
    """
    from regionspot.modeling.presets import create_model

    return create_model(
        arguments.model,
        sam_weights=arguments.sam_weights,
        clip_weights=arguments.clip_weights,
        head_weights=arguments.head_weights,
        random_weights=arguments.random_weights,
        device=arguments.device,
        dtype=dtype,
    )


def check_threads(arguments: argparse.Namespace) -> None:
    """Raises InputError for a number of threads that no machine has; runtimes would start them."""
    if arguments.threads is not None and not 1 <= arguments.threads <= MAX_THREADS:
        raise InputError(f"--threads must be from 1 to {MAX_THREADS}, not {arguments.threads}")


def check_runtime(arguments: argparse.Namespace) -> None:
    """What of the runtime's options can be refused before anything heavy is loaded.

    Raises:
        InputError: options that do not go together.
    """
    check_threads(arguments)
    if arguments.runtime == TRITON:
        _check_triton(arguments)
        return
    for option in ("url", *CREDENTIALS):
        if getattr(arguments, option) is not None:
            raise InputError(
                f"--{option.replace('_', '-')} goes with --runtime {TRITON}, not with "
                f"{arguments.runtime}: leave it out"
            )
    if arguments.runtime == "torch":
        if arguments.artifacts:
            raise InputError(
                "torch runs the weights themselves: --artifacts goes with another --runtime "
                f"({', '.join(model_runtimes())})"
            )
        if arguments.precision not in (None, *TORCH_PRECISIONS):
            raise InputError(
                f"torch works in {', '.join(TORCH_PRECISIONS)}, not in {arguments.precision}: "
                f"leave out --precision, or use artefacts in {arguments.precision} with another "
                f"--runtime ({', '.join(model_runtimes())})"
            )
        return
    if not arguments.artifacts:
        raise InputError(
            f"--runtime {arguments.runtime} runs exported graphs: name their directory with "
            f"--artifacts. To make it:\n  {export_command(arguments)}"
        )
    given = [option for option in WEIGHT_OPTIONS if getattr(arguments, option) is not None]
    if given:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in given)
        raise InputError(
            f"{options} would be ignored: the artefacts in {arguments.artifacts} hold their own "
            "weights. Leave out the weights, or use --runtime torch without --artifacts"
        )


def _check_triton(arguments: argparse.Namespace) -> None:
    if not arguments.url:
        raise InputError(
            "--runtime triton needs --url HOST:PORT of the server's gRPC port: `regionspot-serve "
            "up` says it"
        )
    given = [
        option
        for option in (*WEIGHT_OPTIONS, "artifacts", "precision", "threads")
        if getattr(arguments, option) is not None
    ]
    if given:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in given)
        raise InputError(
            f"{options} would be ignored: the server at {arguments.url} has its own; leave them out"
        )


def export_command(arguments: argparse.Namespace) -> str:
    """The command that makes artefacts of the model that the options name, for the runtime that
    they name.
    """
    words = ["regionspot-export", "--model", arguments.model]
    for option in WEIGHT_OPTIONS:
        if (value := getattr(arguments, option)) is not None:
            name = "weights" if option == "head_weights" else option.replace("_", "-")
            words += [f"--{name}", str(value)]
    option = export_option(arguments.runtime, arguments.precision)
    words += ["--out", arguments.artifacts or "artifacts", option]
    is_trial = arguments.model == DEFAULT_MODEL or arguments.random_weights is not None
    if arguments.precision in QUANTIZED and not is_trial:
        words += ["--calibration", "IMAGES"]
    return shlex.join(
        [*words, "--precision", arguments.precision] if arguments.precision else words
    )


@contextmanager
def load_recognizer(arguments: argparse.Namespace) -> Iterator[RegionSpot | RegionPipeline]:
    """The model with PyTorch, or a pipeline of the artefacts that the options name, without any
    weights loaded.

    A pipeline is closed at the end of the `with`: TensorRT-RTX saves its compiled kernels then.

    Raises:
        InputError, ArtifactError: as `load_model` and `check_runtime`; artefacts that are missing,
            damaged, of another model, or made for another runtime or precision.
    """
    check_runtime(arguments)
    if arguments.runtime == "torch":
        model = load_model(arguments, arguments.precision)
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        yield model
        return
    if arguments.runtime == TRITON:
        from regionspot.serving.triton import pipeline_from_triton

        if arguments.token_file is not None:
            raise InputError(
                f"--token-file is for a gateway, and this needs the server itself at "
                f"{arguments.url}: leave it out"
            )
        with pipeline_from_triton(arguments.url, **tls_files(arguments)) as served:
            if arguments.model not in (DEFAULT_MODEL, served.name):
                raise InputError(
                    f"{arguments.url} serves {served.name}, not {arguments.model}: leave out "
                    "--model"
                )
            yield served
        return
    from regionspot.runtime.opening import open_pipeline

    where = {"device": arguments.device, "threads": arguments.threads}
    with open_pipeline(
        arguments.artifacts, arguments.runtime, arguments.precision, **where
    ) as pipeline:
        if arguments.model not in (DEFAULT_MODEL, pipeline.name):
            raise InputError(
                f"the artefacts in {arguments.artifacts} are of {pipeline.name}, not of "
                f"{arguments.model}: leave out --model, or make others:\n  "
                f"{export_command(arguments)}"
            )
        yield pipeline
