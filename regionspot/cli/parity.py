"""`regionspot parity A B`: do two runtimes of a model give the same?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.models import DEFAULT_MODEL, WEIGHT_OPTIONS, add_model_options, check_threads, load_model

if TYPE_CHECKING:
    from regionspot.export.sides import Side

EXIT_BREACH = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot parity",
        description="Compare two runtimes of a model, graph by graph and end to end; exits with 1 if they differ by "
        "more than the coarser of their precisions allows. Artefacts that failed when they were made are tried again. "
        "The weights are needed in any case: the model computes the real inputs of the later graphs.",
    )
    for name in ("A", "B"):
        parser.add_argument(name.lower(), metavar=name, help="torch, or DIR[:RUNTIME[:PRECISION]] (onnxruntime, fp32)")
    add_model_options(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="pictures to compare on (%(default)s)")
    parser.add_argument(
        "--pictures", metavar="JSON|DIR", help="annotations in COCO format, or a folder (default: the mini world)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of CPU runtimes (default: the physical cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_threads(arguments)
    from regionspot.export.build import PIPELINE_GRAPHS, recognizer_spec
    from regionspot.export.inputs import ParityInputs
    from regionspot.export.report import format_comparison
    from regionspot.export.sides import Side, compare_graph, compare_pipelines, shared_specs

    a, b = Side.parse(arguments.a), Side.parse(arguments.b)
    specs = shared_specs(a, b)
    _complete(arguments, a, b)
    inputs = ParityInputs(load_model(arguments), arguments.pictures, arguments.images)
    print(f"A: {a.title}\nB: {b.title}\non {inputs.num_images} of {inputs.pictures.source}, and on seeded inputs\n")
    rows = {}
    for spec in specs.values():
        rows[spec.name] = compare_graph(a, b, spec, inputs, arguments.threads)
        inputs.forget(spec)
    whole = None
    if set(PIPELINE_GRAPHS) <= set(specs):
        with_text = "clip_text_encoder" in specs
        recognizer = recognizer_spec(inputs.specs["region_recognizer"], specs["region_head"])
        whole = compare_pipelines(a, b, recognizer, with_text, inputs, arguments.threads)
    print(format_comparison(rows, whole))
    passed = not any(row.passed is False for row in (*rows.values(), *([whole] if whole else [])))
    if arguments.json:
        from regionspot.files import write_atomically

        content: dict[str, Any] = {"a": a.title, "b": b.title, "passed": passed}
        content["graphs"] = [{"name": name, **row.to_json()} for name, row in rows.items()]
        content["end_to_end"] = whole.to_json() if whole else None
        write_atomically(arguments.json, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return 0 if passed else EXIT_BREACH


def _complete(arguments: argparse.Namespace, a: Side, b: Side) -> None:
    """Take the model's name, and the seed of random weights, from the artefacts where the options leave them open.

    Raises:
        InputError: the options name another model than the artefacts are of.
    """
    from regionspot.errors import InputError

    manifest = next(side.manifest for side in (a, b) if side.manifest is not None)
    if arguments.model not in (DEFAULT_MODEL, manifest.model.name):
        raise InputError(f"{manifest.directory} holds artefacts of {manifest.model.name}, not of {arguments.model}")
    arguments.model = manifest.model.name
    if all(getattr(arguments, option) is None for option in WEIGHT_OPTIONS):
        arguments.random_weights = manifest.source.get("random_weights")
