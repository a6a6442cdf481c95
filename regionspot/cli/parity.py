"""`regionspot parity A B`: do two runtimes of a model give the same?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.models import (
    DEFAULT_MODEL,
    WEIGHT_OPTIONS,
    add_model_options,
    check_threads,
    load_model,
)
from regionspot.cli.outputs import (
    artifact_files,
    check_outputs,
    json_bytes,
    model_files,
    table_stream,
    write_output,
)
from regionspot.cli.paths import local_path

if TYPE_CHECKING:
    from regionspot.export.parity import EndToEndResult, ParityResult
    from regionspot.export.parity_inputs import ParityInputs
    from regionspot.export.sides import ParityOperand
    from regionspot.runtime.graph_spec import GraphSpec

EXIT_BREACH = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot parity",
        description="Compare two runtimes of a model, graph by graph and end to end; exits with 1 "
        "if they differ by more than the coarser of their precisions allows. "
        "Artefacts that failed when they were made are tried again. The weights are "
        "needed in any case: the model computes the real inputs of the later graphs.",
    )
    for name in ("A", "B"):
        parser.add_argument(
            name.lower(),
            metavar=name,
            help="torch, or DIR[:RUNTIME[:PRECISION]] (onnxruntime, fp32)",
        )
    add_model_options(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "--images", type=int, default=4, metavar="N", help="pictures to compare on (%(default)s)"
    )
    parser.add_argument(
        "--pictures",
        metavar="JSON|DIR",
        type=local_path,
        help="annotations in COCO format, or a folder (default: the mini world)",
    )
    parser.add_argument(
        "--bisect",
        action="store_true",
        help="find where they part: per graph the first tensors that differ by more than the "
        "tolerance, in the order in which they are computed, and the largest drop of the SQNR; "
        "for ONNX files in ONNX Runtime (torch stands for the one in fp32)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of CPU runtimes (default: the physical cores)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_threads(arguments)
    _check_json(arguments)
    from regionspot.export.build import recognizer_spec
    from regionspot.export.parity_inputs import ParityInputs
    from regionspot.export.report import format_comparison
    from regionspot.export.sides import (
        ParityOperand,
        compare_graph,
        compare_pipelines,
        onnx_operands,
        shared_specs,
    )
    from regionspot.runtime.graphs import required_graphs

    a, b = ParityOperand.parse(arguments.a), ParityOperand.parse(arguments.b)
    if arguments.bisect:
        a, b = onnx_operands(a, b)
    specs = shared_specs(a, b)
    _complete(arguments, a, b)
    inputs = ParityInputs(load_model(arguments), arguments.pictures, arguments.images)
    stream = table_stream(arguments.json)
    print(
        f"A: {a.title}\nB: {b.title}\non {inputs.num_images} of {inputs.pictures.source}, and on "
        "seeded inputs\n",
        file=stream,
    )
    if arguments.bisect:
        return _bisect(arguments, a, b, specs, inputs)
    rows = {}
    for spec in specs.values():
        rows[spec.name] = compare_graph(a, b, spec, inputs, arguments.threads)
        inputs.forget(spec.name)
    whole = None
    if set(required_graphs()) <= set(specs):
        with_text = "clip_text_encoder" in specs
        recognizer = recognizer_spec(inputs.specs["region_recognizer"], specs["region_head"])
        whole = compare_pipelines(a, b, recognizer, with_text, inputs, arguments.threads)
    results: list[ParityResult | EndToEndResult] = [*rows.values(), *([whole] if whole else [])]
    passed = not any(result.passed is False for result in results)
    if arguments.json:
        content: dict[str, Any] = {"a": a.title, "b": b.title, "passed": passed}
        content["graphs"] = [{"name": name, **row.to_json()} for name, row in rows.items()]
        content["end_to_end"] = whole.to_json() if whole else None
        write_output(arguments.json, json_bytes(content))
    print(format_comparison(rows, whole), file=stream)
    return 0 if passed else EXIT_BREACH


def _bisect(
    arguments: argparse.Namespace,
    a: ParityOperand,
    b: ParityOperand,
    specs: Mapping[str, GraphSpec],
    inputs: ParityInputs,
) -> int:
    """Where B parts from A in each graph: 0, or 1 if a tensor breaches the tolerance."""
    from regionspot.export.report import format_divergences
    from regionspot.export.sides import bisect_graph

    found = {}
    for spec in specs.values():
        found[spec.name] = bisect_graph(a, b, spec, inputs, arguments.threads)
        inputs.forget(spec.name)
    passed = not any(one if isinstance(one, str) else one.first for one in found.values())
    if arguments.json:
        graphs = [
            {"name": name, **({"reason": one} if isinstance(one, str) else one.to_json())}
            for name, one in found.items()
        ]
        content = {"a": a.title, "b": b.title, "passed": passed, "bisect": graphs}
        write_output(arguments.json, json_bytes(content))
    print(format_divergences(found), file=table_stream(arguments.json))
    return 0 if passed else EXIT_BREACH


def _check_json(arguments: argparse.Namespace) -> None:
    """Raises InputError where --json would overwrite something that is read."""
    sides = [
        file
        for side in (arguments.a, arguments.b)
        for file in artifact_files(side.partition(":")[0])
    ]
    check_outputs(
        {"--json": arguments.json},
        {"--pictures": arguments.pictures, "an artefact": sides, **model_files(arguments)},
    )


def _complete(arguments: argparse.Namespace, a: ParityOperand, b: ParityOperand) -> None:
    """Take the model's name, and the seed of random weights, from the artefacts where the options
    leave them open.

    Raises:
        InputError: the options name another model than the artefacts are of.
    """
    from regionspot.errors import InputError

    manifest = next(side.manifest for side in (a, b) if side.manifest is not None)
    if arguments.model not in (DEFAULT_MODEL, manifest.model.name):
        raise InputError(
            f"{manifest.directory} holds artefacts of {manifest.model.name}, not of "
            f"{arguments.model}"
        )
    arguments.model = manifest.model.name
    if all(getattr(arguments, option) is None for option in WEIGHT_OPTIONS):
        arguments.random_weights = manifest.source.get("random_weights")
