"""`regionspot-export`: weights to artefacts that are proven to be equal to the model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.models import (
    DEFAULT_MODEL,
    WEIGHT_OPTIONS,
    add_model_options,
    check_threads,
    load_model,
)
from regionspot.cli.outputs import check_outputs, json_bytes, model_files, write_output
from regionspot.cli.paths import local_path
from regionspot.errors import InputError
from regionspot.runtime.engine_file import FLAVOURS, HARDWARE_LEVELS
from regionspot.runtime.formats import FORMATS, NATIVE, ONNX
from regionspot.runtime.tolerance import PRECISIONS, QUANTIZED

if TYPE_CHECKING:
    from regionspot.export.making import EngineOptions
    from regionspot.export.plan import Step
    from regionspot.modeling.regionspot import RegionSpot

EXIT_BREACH = 1
TOYS = "mini"
"""What --calibration takes for scenes of the mini world."""

SIZES = ("batch", "regions", "prompts", "points")  # dynamic axes whose ranges can be set


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot-export",
        description="Turn weights into ONNX, OpenVINO and TensorRT artefacts. Each is run in a "
        "process of its own and compared with the PyTorch model, graph by graph and "
        "end to end; exits with 1 if one differs. OpenVINO and TensorRT are made from "
        "ONNX, which is kept as well.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for manifest.json and the artefacts"
    )
    add_model_options(parser)
    parser.add_argument(
        "--weights", dest="head_weights", metavar="HEAD", help="the same as --head-weights"
    )
    parser.set_defaults(device="cpu")
    _add_selection_options(parser)
    _add_verification_options(parser)
    _add_engine_options(parser)
    return parser


def _add_selection_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to make")
    for row in FORMATS.values():
        if row.option is not None:
            what.add_argument(
                f"--{row.option}",
                action="append_const",
                dest="formats",
                const=row.name,
                help=row.help,
            )
    what.add_argument(
        "--precision",
        metavar="LIST",
        help=f"of {', '.join(PRECISIONS)} (default: fp32 for CPUs, fp16 for GPUs); fp8 for GPUs "
        "of compute capability 8.9 and later alone",
    )
    what.add_argument(
        "--graphs",
        metavar="LIST",
        help="only these, or all; region_recognizer, all in one, is made on request alone",
    )
    what.add_argument(
        "--batch",
        metavar="MIN:OPT:MAX",
        help="images at a time (default: 1:1:8, for GPUs 1:4:8; there the graphs that take prompts "
        "or regions take one image)",
    )
    what.add_argument(
        "--regions", metavar="MIN:OPT:MAX", help="regions of an image (default: 1:32:300)"
    )
    what.add_argument(
        "--prompts",
        metavar="MIN:OPT:MAX",
        help="prompts of an image at a time (default: 1:32:64, for GPUs 1:32:32)",
    )
    what.add_argument(
        "--points",
        metavar="MIN:OPT:MAX",
        help="points of a prompt, two for a box (default: 1:2:16)",
    )
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be made, and how large; load no weights",
    )
    what.add_argument(
        "--resume", action="store_true", help="keep what an earlier run made and verified"
    )


def _add_verification_options(parser: argparse.ArgumentParser) -> None:
    compared = parser.add_argument_group("verification and calibration")
    compared.add_argument(
        "--calibration",
        metavar=f"JSON|DIR|{TOYS}",
        type=lambda text: text if text == TOYS else local_path(text),
        help="images for the ranges of int8 and fp8 and for the comparison: annotations in COCO "
        f"format, or a folder; {TOYS} for scenes of the mini world (the default, but for int8 and "
        "fp8 of other models than regionspot_mini with weights of files)",
    )
    compared.add_argument(
        "--parity-images",
        type=int,
        default=4,
        metavar="N",
        help="pictures to compare on (%(default)s)",
    )
    compared.add_argument(
        "--threads", type=int, metavar="N", help="of CPU runtimes (default: the physical cores)"
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    engines = parser.add_argument_group("TensorRT")
    engines.add_argument(
        "--compute-capability",
        metavar="LIST",
        help="the GPUs that RTX engines are for, such as 89,120",
    )
    engines.add_argument(
        "--opt-level", type=int, default=3, metavar="N", help="0 builds fastest, 5 searches longest"
    )
    engines.add_argument(
        "--workspace", type=int, metavar="MIB", help="most scratch memory of a layer"
    )
    engines.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="makes later builds faster"
    )
    engines.add_argument(
        "--version-compatible",
        action="store_true",
        help="--trt: engines that later releases of TensorRT load too; they use only what NVIDIA's "
        "lean runtime has, may be slower, and carry code: load none that you do not trust",
    )
    engines.add_argument(
        "--hardware-compatible",
        nargs="?",
        const=HARDWARE_LEVELS[0],
        choices=HARDWARE_LEVELS,
        metavar="LEVEL",
        help="--trt: engines for all GPUs from Ampere on (ampere_plus, where no level is named) or "
        "all of this GPU's compute capability (same_compute_capability); fewer kernels and fusions "
        "remain, so they may be slower",
    )
    engines.add_argument(
        "--report",
        type=Path,
        metavar="JSON",
        help="write a summary of each engine: fused attentions, kernels, memory traffic, scratch",
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_threads(arguments)
    images = None if arguments.calibration == TOYS else arguments.calibration
    inputs = {"--calibration": images, **model_files(arguments)}
    outputs = {"--timing-cache": arguments.timing_cache, "--report": arguments.report}
    check_outputs(outputs, inputs)
    if arguments.report is not None and not set(formats_of(arguments)) & set(FLAVOURS):
        raise InputError("--report says what engines came to: add --trt or --trt-rtx")
    compatible = arguments.version_compatible or arguments.hardware_compatible
    if compatible and "tensorrt" not in formats_of(arguments):
        raise InputError(
            "--version-compatible and --hardware-compatible are for TensorRT's engines: add --trt"
        )
    from regionspot.export.plan import estimate, format_plan, sizing_model

    if arguments.dry_run:
        sizes = sizing_model(arguments.model, arguments.head_weights)
        print(format_plan(estimate(_plan(arguments, sizes), sizes)))
        return 0
    return _export(arguments)


def formats_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns the formats that the options ask for, in the order in which they are made.

    Formats for a CPU come with the weights for our own token decoder, which is faster there.
    """
    asked = arguments.formats or [ONNX]
    formats = [name for name in FORMATS if name in asked]
    return (
        (*formats, NATIVE) if any(FORMATS[name].runs_on_cpu for name in formats) else tuple(formats)
    )


def _plan(arguments: argparse.Namespace, model: RegionSpot) -> tuple[Step, ...]:
    """Raises InputError for options that name nothing that there is."""
    from regionspot.export.plan import choose_graphs, choose_precisions, make_plan
    from regionspot.modeling.graphs import model_sizes
    from regionspot.runtime.graph_spec import Range
    from regionspot.runtime.graphs import Ranges, gpu_graph_specs, graph_specs

    given = {name: Range.parse(text) for name in SIZES if (text := getattr(arguments, name))}
    info = model_sizes(model)
    chosen = choose_graphs(graph_specs(info, Ranges(**given)), arguments.graphs)
    precisions = None if arguments.precision is None else choose_precisions(arguments.precision)
    gpu_specs = gpu_graph_specs(info, Ranges.for_gpu(**given))
    return make_plan(chosen, formats_of(arguments), precisions, gpu_specs)


def _export(arguments: argparse.Namespace) -> int:
    from regionspot.export.plan import check_libraries, sizing_model

    check_libraries(formats_of(arguments))
    engine = _engine_options(arguments)
    # what is wrong with it, before weights are loaded
    _check_calibration(arguments, _plan(arguments, sizing_model(arguments.model)))
    from regionspot.export.build import Settings, export
    from regionspot.export.parity_inputs import ParityInputs
    from regionspot.export.report import format_report, layer_figures

    model = load_model(arguments)
    source = None if arguments.calibration == TOYS else arguments.calibration
    inputs = ParityInputs(model, source, arguments.parity_images)
    print(f"comparing on {inputs.num_images} of {inputs.pictures.source}, and on seeded inputs")
    steps = _plan(arguments, model)
    if quantized := _quantized(steps):
        images = f"{inputs.num_calibration_images} of {inputs.pictures.source}"
        print(f"calibrating {' and '.join(quantized)} on {images}")
    settings = Settings(
        arguments.out, arguments.resume, _source(arguments), engine, arguments.threads
    )
    report = export(model, steps, inputs, settings)
    if arguments.report is not None:
        write_output(arguments.report, json_bytes(layer_figures(report, arguments.out)))
    print(f"\n{format_report(report)}\n\n{arguments.out / 'manifest.json'}")
    return 0 if report.passed else EXIT_BREACH


def _check_calibration(arguments: argparse.Namespace, steps: Sequence[Step]) -> None:
    """Raises InputError where real weights of a full-size model would be calibrated on toys that
    nobody asked for.

    Random weights have no use but trying sizes and speed, for which any images do.
    """
    quantized = _quantized(steps)
    is_trial = arguments.model == DEFAULT_MODEL or arguments.random_weights is not None
    if not quantized or is_trial or arguments.calibration is not None:
        return
    raise InputError(
        f"{' and '.join(quantized)} of {arguments.model} needs images to take the ranges of its "
        "tensors from, and scenes of the mini world are drawings, whose ranges are not those of "
        "photographs: give --calibration DIR, a folder with some dozens of images like those that "
        f"the model will see, or --calibration {TOYS} to take the drawings nevertheless"
    )


def _quantized(steps: Sequence[Step]) -> list[str]:
    """The precisions among the steps' that are calibrated on images."""
    return [one for one in QUANTIZED if any(step.precision == one for step in steps)]


def _source(arguments: argparse.Namespace) -> dict[str, Any]:
    """Names of the weight files, without their folders, or the seed."""
    named = {
        option: getattr(arguments, option)
        for option in WEIGHT_OPTIONS
        if getattr(arguments, option) is not None
    }
    return {
        option: Path(value).name if isinstance(value, str) else value
        for option, value in named.items()
    }


def _engine_options(arguments: argparse.Namespace) -> EngineOptions:
    from regionspot.errors import InputError
    from regionspot.export.making import EngineOptions

    capabilities = None
    if arguments.compute_capability:
        try:
            capabilities = tuple(
                int(part.replace(".", "")) for part in arguments.compute_capability.split(",")
            )
        except ValueError as error:
            raise InputError(
                f"--compute-capability {arguments.compute_capability!r} is no list of numbers such "
                "as 89,120"
            ) from error
    return EngineOptions(
        capabilities,
        arguments.opt_level,
        arguments.workspace,
        arguments.timing_cache,
        arguments.version_compatible,
        arguments.hardware_compatible,
    )
