"""The stages of `regionspot.benchmarks.gpu_check`, and what each does in a process of its own:
`python -m regionspot.benchmarks.gpu_stages STAGE ...` prints a line of JSON for each row.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regionspot.benchmarks.latency_worker import WHOLE, Request
from regionspot.child_process import ModuleRun
from regionspot.runtime.formats import FORMATS, RUNTIMES
from regionspot.runtime.graphs import required_graphs

THIS = "regionspot.benchmarks.gpu_stages"
WORDS = 80
ENCODERS = ("sam_image_encoder", "clip_image_encoder")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("PASSED", "FAILED", "SKIPPED", "ERROR")

Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of the check.

    Args:
        name: of its rows.
        module, arguments: what runs, see `run_module`.
        limit_s: seconds that it may take.
        read: makes rows of what it printed, however it ended.
        modules: Python modules that must be installed.
    """

    name: str
    module: str
    arguments: tuple[object, ...]
    limit_s: float
    read: Callable[[ModuleRun], list[Row]] = lambda run: run.rows
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to check.

    Args:
        model: arguments of `create_model`.
        artifacts: directory of artefacts.
        export: make the artefacts first.
        work: folder for files between stages.
        device: "cuda", or "cpu" for a dry run.
        seconds: of each measurement, about.
        batches: images at a time, of the encoders; everything else has one.
        regions: of an image.
    """

    model: Mapping[str, Any]
    artifacts: Path
    export: bool
    work: Path
    device: str = "cuda"
    seconds: float = 1.0
    batches: tuple[int, ...] = (1, 8)
    regions: tuple[int, ...] = (20, 100, 300)


def stages(plan: Plan) -> list[Stage]:
    """In the order in which they run: what is quick and what needs no artefacts first."""
    on_gpu = plan.device != "cpu"
    tests = "tests" if on_gpu else "tests/runtime/test_runners.py"
    found = [
        Stage("device", THIS, ("device", plan.device), 60),
        Stage("doctor", "regionspot.cli.main", ("doctor", "--json"), 150, _findings),
        Stage("rates", THIS, ("rates", plan.device), 60),
    ]
    in_torch = [("torch", "fp32"), ("torch", "bf16"), ("torch-compile", "bf16")]
    found += [_latency(plan, *target) for target in (in_torch if on_gpu else in_torch[:1])]
    if (ROOT / "tests").is_dir():
        options = ("-m", "gpu", "-v", "--tb=line", "-p", "no:cacheprovider")
        found.append(Stage("gpu tests", "pytest", (*options, ROOT / tests), 180, _outcomes))
    for runtime, made in _runtimes(on_gpu):
        modules = (*RUNTIMES[runtime].modules, *(FORMATS[made].modules if plan.export else ()))
        if plan.export:
            arguments = (
                "export",
                "--out",
                plan.artifacts,
                "--resume",
                f"--{FORMATS[made].option}",
                *_weights(plan),
            )
            arguments += ("--parity-images", "1", "--graphs", ",".join(required_graphs()))
            found.append(
                Stage(f"export {made}", "regionspot.cli.main", arguments, 300, _ended, modules)
            )
        arguments = ("parity", "torch", f"{plan.artifacts}:{runtime}", "--images", "1", "--json")
        parity = Stage(
            f"parity {runtime}",
            "regionspot.cli.main",
            (*arguments, plan.work / f"{runtime}.parity.json", *_weights(plan)),
            120,
            partial(_parity, path=plan.work / f"{runtime}.parity.json"),
            modules,
        )
        found += [_latency(plan, runtime, None), parity]
    return found


def _runtimes(on_gpu: bool) -> list[tuple[str, str]]:
    """Runtimes that open artefacts, and the format that is made for each."""
    if not on_gpu:
        return [("onnxruntime", RUNTIMES["onnxruntime"].opens[0])]
    able = [row for row in RUNTIMES.values() if row.whole_models and "cuda" in row.devices]
    return [(row.name, row.opens_on("cuda")[0]) for row in able]


def _weights(plan: Plan) -> tuple[str, ...]:
    seed = plan.model.get("random_weights")
    return ("--model", plan.model["name"]) + (
        () if seed is None else ("--random-weights", str(seed))
    )


def _latency(plan: Plan, runtime: str, precision: str | None) -> Stage:
    """Encoders in batches; then everything for one image. `precision` None is what the runtime
    prefers of the artefacts.
    """
    encoders = Request(
        runtime=runtime,
        precision=precision or "",
        graphs=list(ENCODERS),
        batches=list(plan.batches),
        regions=list(plan.regions),
        words=WORDS,
        picture=str(plan.work / "picture"),
        seconds=plan.seconds,
        at_least=3 if plan.device != "cpu" else 1,
        at_most=200,
        device=plan.device,
        model=dict(plan.model),
        artifacts=str(plan.artifacts),
    )
    others = [name for name in required_graphs() if name not in ENCODERS]
    rest = replace(encoders, graphs=[*others, WHOLE], batches=[1])
    name = f"latency {runtime}" + (f"_{precision}" if precision else "")
    path = plan.work / f"{name}.json"
    path.write_text(json.dumps([asdict(encoders), asdict(rest)]))
    modules = () if runtime.startswith("torch") else RUNTIMES[runtime].modules
    limit_s = 240 if runtime == "torch-compile" else 90
    return Stage(name, THIS, ("latency", path), limit_s, modules=modules)


def _findings(run: ModuleRun) -> list[Row]:
    try:
        findings = json.loads(run.output)["findings"]
    except (ValueError, KeyError):
        return []
    return [
        {"graph": one["name"], "result": one["status"], "note": one["detail"]} for one in findings
    ]


def _outcomes(run: ModuleRun) -> list[Row]:
    """What tests did, as far as they came; those that failed by name."""
    lines = run.output.decode(errors="replace").splitlines()
    outcome = re.compile(rf"(\S+::.+?) ({'|'.join(RESULTS)})\b")
    found = [match for line in lines if (match := outcome.match(line))]
    results = [match[2] for match in found]
    counted = ", ".join(f"{results.count(one)} {one.lower()}" for one in RESULTS if one in results)
    rows: list[Row] = [{"result": counted or "none"}]
    rows += [
        {"graph": match[1].rpartition("/")[2], "result": match[2]}
        for match in found
        if match[2] in ("FAILED", "ERROR")
    ]
    return rows


def _parity(run: ModuleRun, path: Path) -> list[Row]:
    """A graph's verdict; and that of the whole model."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    listed = [*report["graphs"], {"name": "end to end", **(report["end_to_end"] or {})}]
    words = {True: "passed", False: "FAILED", None: "not compared"}
    return [
        {
            "graph": one["name"],
            "result": words[one.get("passed")],
            "note": one.get("reason") or None,
        }
        for one in listed
    ]


def _ended(run: ModuleRun) -> list[Row]:
    return [] if run.failure else [{"result": "made and verified"}]


def missing_module(stage: Stage) -> str | None:
    """Returns the first module that it needs and that is not installed."""
    return next((name for name in stage.modules if find_spec(name) is None), None)


def main(argv: Sequence[str] | None = None) -> int:
    """The child's side: 0, or 2 with one line on stderr for what is not usable."""
    from regionspot.errors import RegionSpotError

    kind, argument = sys.argv[1:] if argv is None else argv
    work = {"device": _device, "rates": _rates, "latency": _latencies, "roofline": _rooflines}
    try:
        for row in work[kind](argument):
            print(json.dumps(row), flush=True)
    except (RegionSpotError, RuntimeError) as error:  # the latter is PyTorch's
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _device(device: str) -> Iterator[Row]:
    import torch

    if device == "cpu":
        yield {"graph": "cpu", "result": "dry run", "note": "numbers mean nothing"}
        return
    from regionspot.modeling.devices import resolve_device

    properties = torch.cuda.get_device_properties(resolve_device(device))
    yield {
        "graph": properties.name,
        "result": f"compute capability {properties.major}.{properties.minor}",
        "note": f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} "
        f"multiprocessors, CUDA {torch.version.cuda}",
    }


def _rates(device: str) -> Iterator[Row]:
    from regionspot.benchmarks.roofline import measure_rates

    rates = measure_rates(device)
    for precision, rate in rates.gemm.items():
        yield {"graph": "matrix product", "precision": precision, "gflops": rate / 1e9}
    yield {"graph": "copy", "result": f"{rates.copy / 1e9:.0f} GB/s", "copy": rates.copy}


def _latencies(path: str) -> Iterator[Row]:
    from regionspot.benchmarks.latency_worker import measure
    from regionspot.benchmarks.targets import Target, open_target
    from regionspot.predictor import as_pipeline

    requests = [Request(**one) for one in json.loads(Path(path).read_text())]
    first = requests[0]
    if not first.precision:
        requests = [replace(one, precision=_preferred(first)) for one in requests]
        first = requests[0]
    target = Target(first.runtime, first.precision)
    with open_target(target, first.model, first.artifacts, first.device, first.threads) as opened:
        pipeline = as_pipeline(opened)
        for request in requests:
            yield from measure(pipeline, request)


def _preferred(request: Request) -> str:
    """The precision that a runtime takes of a directory on that device."""
    from regionspot.runtime.artifacts import Manifest
    from regionspot.runtime.opening import choose_artifacts

    manifest = Manifest.load(request.artifacts)
    return choose_artifacts(manifest, request.runtime, None, request.device)[1]


def _rooflines(path: str) -> Iterator[Row]:
    """The figures of every timed row of a report, in their order."""
    from regionspot.benchmarks.latency import roofline
    from regionspot.benchmarks.roofline import GraphCosts, Rates

    report = json.loads(Path(path).read_text())
    rates = [row for row in report["rows"] if row["stage"] == "rates"]
    gemm = {row["precision"]: 1e9 * row["gflops"] for row in rates if "gflops" in row}
    copy = next((row["copy"] for row in rates if "copy" in row), None)
    if copy is None:
        return
    costs = GraphCosts(report["conditions"]["model"])
    for row in report["rows"]:
        if "p50_ms" in row:
            yield roofline(row, costs, Rates(gemm, copy), report["conditions"]["words"])


if __name__ == "__main__":
    sys.exit(main())
