"""`python -m regionspot.benchmarks.engine_builds`: what a model's TensorRT-RTX engines take to
build, without a GPU.

Each engine is built in a process of its own, one after another. Timed is `build_engine` without
writing the file: to parse and to build. Memory is that process's resident peak, with TensorRT's
libraries. Weights are random: sizes and times are the trained model's, and say nothing of accuracy.
`regionspot-export --trt-rtx` makes the same engines, and verifies the ONNX files that they are made
from.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.memory import PeakMemory
from regionspot.child_process import run_module
from regionspot.errors import ArtifactError, RegionSpotError
from regionspot.export.trt_engine import build_engine
from regionspot.files import write_atomically
from regionspot.provenance import version_of
from regionspot.runtime.artifacts import spec_from_json, spec_to_json
from regionspot.runtime.formats import GPU
from regionspot.runtime.graph_spec import GraphSpec

FLAVOUR = "tensorrt-rtx"
PACKAGE = "tensorrt_rtx-cu13-bindings"
SEED = 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regionspot.benchmarks.engine_builds",
        description="Seconds, memory and size of a model's TensorRT-RTX engines, built ahead of "
        "time without a GPU.",
    )
    parser.add_argument(
        "--model", default="regionspot_bl", help="with random weights (default: %(default)s)"
    )
    parser.add_argument(
        "--graphs", metavar="LIST", help="only these (default: all but region_recognizer)"
    )
    parser.add_argument(
        "--precision",
        default="fp16",
        metavar="LIST",
        help="of fp32, fp16, bf16 (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)  # the child's side
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.request:
            print(json.dumps(build_one(**json.loads(arguments.request.read_text()))))
            return 0
        results = measure(arguments.model, arguments.graphs, arguments.precision)
    except RegionSpotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(results, indent=2) + "\n").encode())
    return 0


def measure(model_name: str, graphs: str | None, precisions: str) -> dict[str, Any]:
    """Export, then build one engine after another, printing a line for each."""
    from regionspot.export.onnx_graph import export_onnx
    from regionspot.export.plan import choose_graphs, choose_precisions, on_gpu
    from regionspot.export.precision import write_half
    from regionspot.modeling.graphs import model_info
    from regionspot.modeling.presets import create_model
    from regionspot.runtime.graphs import gpu_graph_specs

    chosen = choose_precisions(precisions)
    model = create_model(model_name, random_weights=SEED)
    specs = choose_graphs(gpu_graph_specs(model_info(model)), graphs)
    results: dict[str, Any] = {
        "command": f"python -m regionspot.benchmarks.engine_builds --model {model_name} "
        f"--precision {precisions}" + (f" --graphs {graphs}" if graphs else ""),
        "conditions": conditions(
            **{PACKAGE: version_of(PACKAGE)}, model=model_name, weights=f"random, seed {SEED}"
        ),
        "engines": [],
    }
    with tempfile.TemporaryDirectory(prefix="regionspot-") as name:
        for spec in specs:
            exported = Path(name) / f"{spec.name}.onnx"
            export_onnx(model, spec, exported, target=GPU)
            for precision in chosen:
                path, typed = exported, on_gpu(spec, precision)
                if precision != "fp32":
                    path = Path(name) / f"{spec.name}-{precision}.onnx"
                    write_half(exported, path, precision, typed.half_tensors)
                row = {"graph": spec.name, "precision": precision, **_in_child(typed, path)}
                results["engines"].append(row)
                print(format_row(row), flush=True)
            for left in Path(name).iterdir():
                left.unlink()
    return results


def _in_child(spec: GraphSpec, onnx_path: Path) -> dict[str, Any]:
    request = onnx_path.with_suffix(".request.json")
    request.write_text(json.dumps({"spec": spec_to_json(spec), "onnx_path": str(onnx_path)}))
    child = run_module("regionspot.benchmarks.engine_builds", "--request", request)
    if child.failure:
        raise ArtifactError(f"building {onnx_path.name} {child.failure}")
    return child.rows[-1]


def build_one(spec: dict[str, Any], onnx_path: str) -> dict[str, Any]:
    """The child's side."""
    path = Path(onnx_path)
    memory = PeakMemory()
    memory.start()
    sidecar = build_engine(path, spec_from_json(spec), path.with_suffix(".engine"), FLAVOUR)
    peak_mb = memory.peak_mb()
    return {
        "onnx_bytes": sum(part.stat().st_size for part in _parts(path)),
        "engine_bytes": sidecar.size_bytes,
        "build_s": sidecar.build_s,
        "peak_mb": None if peak_mb is None else round(peak_mb),
        "compute_capabilities": sidecar.compute_capabilities,
        "fused_attentions": sidecar.layers.get("fused_attentions"),
        "kernels": sidecar.layers.get("kernels"),
        "scratch_mib": sidecar.scratch_mib,
        "profile": {tensor.name: tensor.profile for tensor in sidecar.inputs},
    }


def _parts(path: Path) -> Iterable[Path]:
    """The ONNX file, and the external data beside it."""
    return (part for part in (path, path.with_name(path.name + ".data")) if part.exists())


def format_row(row: dict[str, Any]) -> str:
    peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:6} MiB peak"
    return (
        f"{row['graph']:26}{row['precision']:6}{row['onnx_bytes'] / 2**20:8.1f} MiB ONNX"
        f"{row['engine_bytes'] / 2**20:8.1f} MiB engine{row['build_s']:7.1f} s{peak}"
    )


if __name__ == "__main__":
    sys.exit(main())
