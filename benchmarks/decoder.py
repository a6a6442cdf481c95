"""`python -m regionspot.benchmarks.decoder`: SAM's tokens for many boxes of one image, its
decoder's way and ours.

Timed is everything from the image embedding and boxes to their tokens; ours includes the image
part, which a second question about the same image would not pay again. Each variant runs in a
process of its own, one after another; memory is the resident peak above the loaded model.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.counts import counts
from regionspot.benchmarks.decoder_variants import GRAPHS, REFERENCE_BATCH, VARIANTS, Request
from regionspot.child_process import run_module
from regionspot.errors import ArtifactError, RegionSpotError
from regionspot.export.decoder_weights import write_decoder_weights
from regionspot.export.onnx_graph import export_onnx
from regionspot.export.openvino_ir import convert
from regionspot.files import write_atomically
from regionspot.logs import log_to
from regionspot.modeling.graphs import model_info
from regionspot.runtime.graphs import graph_specs

logger = logging.getLogger(__name__)

SEED = 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regionspot.benchmarks.decoder",
        description="Time and memory of SAM's mask tokens: segment_anything's decoder, the same "
        "without its masks, and the shared-image decoder in PyTorch, ONNX Runtime, "
        "OpenVINO and our own kernels.",
    )
    parser.add_argument(
        "--boxes", default="1,8,64,300", metavar="LIST", help="how many (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument(
        "--model", default="regionspot_bb", help="whose SAM (default: %(default)s, ViT-B)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s"
    )
    parser.add_argument(
        "--prompt-chunk", type=int, default=8, help="prompts at once in the graphs (%(default)s)"
    )
    return parser


@log_to("stderr")
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        request = Request(
            {"name": arguments.model, "random_weights": SEED},
            counts("--boxes", arguments.boxes),
            arguments.threads,
            arguments.prompt_chunk,
        )
        results = measure(request)
    except RegionSpotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(format_table(results)))
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(results, indent=2) + "\n").encode())
    return 0


def measure(request: Request) -> dict[str, Any]:
    """Number of boxes -> seconds and memory of every variant, and the largest difference from
    segment_anything's.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(request, folder)
        found = {variant: dict(_run(variant, folder, request)) for variant in VARIANTS}
        results: dict[str, Any] = {}
        for count in request.boxes:
            of_count = {variant: rows[count] for variant, rows in found.items()}
            tokens = {variant: np.load(folder / f"{variant}-{count}.npy") for variant in VARIANTS}
            reference = tokens["segment_anything"]
            results[str(count)] = {
                **{f"{variant}_s": row["seconds"] for variant, row in of_count.items()},
                "max_abs_diff": max(
                    float(np.abs(each - reference).max()) for each in tokens.values()
                ),
                "peak_mb": {variant: row["peak_mb"] for variant, row in of_count.items()},
                "repetitions": {variant: row["repetitions"] for variant, row in of_count.items()},
            }
    results["conditions"] = conditions(
        model=f"{request.model['name']}, random weights",
        precision="fp32",
        threads=request.threads,
        statistic="median",
        reference_batch=REFERENCE_BATCH,
        prompt_chunk=request.prompt_chunk,
    )
    return results


def _prepare(request: Request, folder: Path) -> None:
    """The exported graphs, one image embedding, and boxes of all sizes."""
    model = request.create_model()
    info = model_info(model)
    specs = graph_specs(info)
    for graph in GRAPHS:
        logger.info(f"exporting {graph}")
        export_onnx(model, specs[graph], folder / f"{graph}.onnx")
        convert(folder / f"{graph}.onnx", folder / f"{graph}.xml", "fp32")
    write_decoder_weights(model.sam, folder / f"{GRAPHS[1]}.npz")
    rng = np.random.default_rng(SEED)
    embeddings = rng.standard_normal((1, info.token_dim, *info.embedding_size), np.float32)
    corners = (
        np.sort(rng.random((max(request.boxes), 2, 2), np.float32), axis=1) * info.sam_image_size
    )
    np.savez(folder / "inputs.npz", image_embeddings=embeddings, corners=corners)
    (folder / "request.json").write_text(json.dumps(asdict(request)))


def _run(variant: str, folder: Path, request: Request) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each number of boxes with what the variant's process measured."""
    logger.info(f"measuring {variant}")
    child = run_module(
        "regionspot.benchmarks.decoder_variants",
        variant,
        folder,
        environment={"OMP_NUM_THREADS": str(request.threads)},
    )
    if child.failure:
        raise ArtifactError(f"{variant} {child.failure}")
    for row in child.rows:
        yield row["boxes"], row


def format_table(results: Mapping[str, Any]) -> list[str]:
    """Seconds, how many times faster than segment_anything, and peak memory."""
    lines = [f"{'boxes':>5}  {'variant':<18}{'seconds':>9}{'faster':>9}{'peak MiB':>10}"]
    for count, row in results.items():
        if count == "conditions":
            continue
        for variant in VARIANTS:
            peak = row["peak_mb"][variant]
            speedup = row["segment_anything_s"] / row[f"{variant}_s"]
            memory = "–" if peak is None else f"{peak:.0f}"
            lines.append(
                f"{count:>5}  {variant:<18}{row[f'{variant}_s']:>9.3f}{speedup:>8.1f}x{memory:>10}"
            )
        lines.append(f"{'':>5}  largest difference of a token: {row['max_abs_diff']:.1e}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
