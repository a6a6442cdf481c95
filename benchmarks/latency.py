"""Time and memory of each graph and of the whole path, for each runtime and precision, beside the
roofline.

Each runtime and precision runs in a process of its own, one after another (`latency_worker`).
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.latency_worker import (
    DECODERS,
    GPU_WARM_UP,
    TEXT_LENGTH,
    WARM_UP,
    WHOLE,
    WHOLE_WITH_MASKS,
    Request,
)
from regionspot.benchmarks.roofline import Cost, GraphCosts, Rates, measure_rates
from regionspot.benchmarks.synthetic import read_picture
from regionspot.benchmarks.targets import Target
from regionspot.child_process import run_module
from regionspot.runtime.formats import RUNTIMES
from regionspot.runtime.graphs import GRAPHS, required_graphs, served_graphs
from regionspot.runtime.pipeline import MASK_PROMPT_GRAPH
from regionspot.runtime.tolerance import QUANTIZED

logger = logging.getLogger(__name__)

MEASURED = (
    *(name for name in served_graphs() if name != MASK_PROMPT_GRAPH),
    WHOLE,
    WHOLE_WITH_MASKS,
)
"""What can be measured: graphs, and the whole path."""

NEEDED = {WHOLE: required_graphs(), WHOLE_WITH_MASKS: (*required_graphs(), "sam_mask_decoder")}
"""The graphs that the whole path runs."""

INCLUDES = (
    "a graph: one run from arrays to arrays, copies to and from a GPU included where a runtime "
    "makes them; decoder graphs: all prompts, in chunks, by our own kernels where `native` says "
    "so; the whole path: a JPEG's bytes to names and scores (and COCO RLE masks), words already "
    "encoded"
)
ROOFLINE = (
    "least_ms: the larger of operations by the measured rate of a matrix product in that precision "
    "and of weights, inputs and outputs by the measured rate of a copy; roofline: its share of "
    "p50_ms. Masks are counted whole, though our own kernels draw none in the padding of a picture "
    "that is not square"
)


@dataclass(frozen=True)
class Setup:
    """What the command line asks for.

    Args:
        model: the preset's name, for counting.
        request: without runtime and precision.
        targets: what is measured, in this order.
        device: "cpu" or "cuda", whose rates the roofline is made of.
    """

    model: str
    request: Request
    targets: Sequence[Target]
    device: str
    picture: str
    seed: int


def measure(setup: Setup) -> dict[str, Any]:
    """The report. Raises RegionSpotError if a picture cannot be read; a target that fails is a row
    with a note.
    """
    picture, described = read_picture(setup.picture, setup.seed)
    rates = measure_rates(setup.device, setup.request.threads)
    costs = GraphCosts(setup.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "picture").write_bytes(picture)
        request = replace(setup.request, picture=str(folder / "picture"))
        rows = [
            row | roofline(row, costs, rates, request.words)
            for target in setup.targets
            for row in _measured(target, request, folder)
        ]
    return {
        "benchmark": "latency",
        "rows": rows,
        "rates": {
            "gemm_gflops": {name: rate / 1e9 for name, rate in rates.gemm.items()},
            "copy_gb_s": rates.copy / 1e9,
        },
        "conditions": conditions(
            model=setup.model,
            picture=described,
            words=request.words,
            threads=request.threads,
            warm_up=WARM_UP if setup.device == "cpu" else GPU_WARM_UP,
            repetitions=f"{request.at_least} to {request.at_most}, until {request.seconds} s",
            memory="resident, MiB: peak_mb above the opened model, total_mb the whole process",
            includes=INCLUDES,
            roofline=ROOFLINE,
        ),
    }


def roofline(row: Mapping[str, Any], costs: GraphCosts, rates: Rates, words: int) -> dict[str, Any]:
    """`gflop`, `mbytes`, `least_ms`, `gflops` (reached) and `roofline` of a row; nothing for what
    failed.
    """
    if "p50_ms" not in row:
        return {}
    parts = [
        (cost_of(graph, row, words, precision, costs), precision)
        for graph, precision in parts_of(row)
    ]
    total, seconds = sum((cost for cost, _ in parts), Cost(0, 0)), row["p50_ms"] / 1000
    each = [rates.least_seconds(*part) for part in parts]
    least = None if None in each else sum(one for one in each if one is not None)
    return {
        "gflop": total.flops / 1e9,
        "mbytes": total.bytes / 1e6,
        "gflops": total.flops / 1e9 / seconds,
        "least_ms": None if least is None else 1000 * least,
        "roofline": None if least is None else least / seconds,
    }


def parts_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The graphs that a row measures, and the precision that each of them works in."""
    graphs = [row["graph"]]
    if row["graph"] in NEEDED:
        decoder = DECODERS[row["graph"]]
        graphs = [
            decoder if graph == "sam_token_decoder_prompts" else graph
            for graph in required_graphs()
        ]
    single = list(DECODERS.values()) if row["native"] else []
    if row["runtime"].startswith("torch"):  # see `regionspot.modeling.precision`
        single += ["sam_token_decoder_image", *DECODERS.values()]
    rest = row["precision"]
    if rest in QUANTIZED:  # of graphs without linear layers that are quantised
        needs_gpu = row["runtime"] in RUNTIMES and RUNTIMES[row["runtime"]].needs_cuda
        rest = "fp16" if needs_gpu else "fp32"
    precisions = {name: row["precision"] if GRAPHS[name].quantized else rest for name in graphs}
    return [(name, "fp32" if name in single else precisions[name]) for name in graphs]


def cost_of(
    graph: str, row: Mapping[str, Any], words: int, precision: str, costs: GraphCosts
) -> Cost:
    """Of a graph at a row's sizes, see `latency_worker`."""
    batch, regions = row["batch"] or 1, row["regions"] or 1
    sizes = {
        "batch": batch,
        "regions": regions,
        "words": words,
        "texts": words,
        "text_length": TEXT_LENGTH,
    }
    if graph not in DECODERS.values():
        return costs.of(graph, sizes, precision)
    sizes |= {"points": 2, "tokens": 1}
    step = max(1, row["prompt_chunk"] // batch)
    whole, rest = divmod(regions, step)
    found = costs.of(graph, sizes | {"prompts": step}, precision).times(whole)
    return found + costs.of(graph, sizes | {"prompts": rest}, precision) if rest else found


def _measured(target: Target, request: Request, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of one process."""
    logger.info(f"measuring {target.name}")
    graphs = [graph for graph in request.graphs if target.has(NEEDED.get(graph, (graph,)))]
    asked = replace(request, runtime=target.runtime, precision=target.precision, graphs=graphs)
    path = folder / f"{target.name}.json"
    path.write_text(json.dumps(asdict(asked)))
    child = run_module("regionspot.benchmarks.latency_worker", path)
    yield from child.rows
    if child.failure:
        note = f"not measured: it {child.failure}"
        logger.info(f"{target.name}: {note}")
        yield {
            "graph": None,
            "runtime": target.runtime,
            "precision": target.precision,
            "note": note,
        }
