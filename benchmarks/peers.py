"""RegionSpot in each runtime beside the research pipeline, CLIP on crops and open-vocabulary
detectors, on one picture.

Each way runs in a process of its own, one after another; memory is that process's resident peak.
The same weights, picture, boxes and words' embeddings go to all of them.
"""

from __future__ import annotations

import json
import logging
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.memory import PeakMemory
from regionspot.benchmarks.peer_rows import VariantResult, rows_of, summary
from regionspot.benchmarks.peer_variants import (
    CLIP_CROPS,
    DETECTORS,
    PEERS,
    RESEARCH,
    SLOW_S,
    TORCH,
    Inputs,
    Request,
    variant_name,
)
from regionspot.benchmarks.synthetic import random_boxes, random_words, read_picture
from regionspot.child_process import run_module
from regionspot.errors import InputError
from regionspot.images import read_image
from regionspot.provenance import version_of
from regionspot.runtime.artifacts import Manifest
from regionspot.runtime.formats import FORMATS, NATIVE
from regionspot.runtime.graphs import required_graphs

logger = logging.getLogger(__name__)

OURS = "ours"
MASK_GRAPH = "sam_mask_decoder"
PACKAGES = ("transformers", "pycocotools")

INCLUDES = (
    "decoding the picture's bytes, resizing, both encoders, SAM's decoder and the head, to scores "
    "of all words; with masks, each as COCO RLE of the picture's size. Not the words' embeddings, "
    "except those of grounding_dino, which fuses text and picture"
)
MEMORY = (
    "resident, MiB: peak_mb above the loaded model, total_mb the whole process, load_peak_mb while "
    "loading. PyTorch's processes also hold CLIP's text tower, exported ones do not"
)
STAGES = (
    "add up to a run. The research pipeline always draws its masks, at the picture's size; of ours "
    "with masks, one graph gives tokens and masks, and its time is that of the masks"
)


@dataclass(frozen=True)
class Setup:
    """What the command line asks for.

    Args:
        model: arguments of `create_model`.
        weights: where they come from, in words.
        artifacts: directory of exported graphs, made from the same weights.
        export_command: makes them.
        picture: "WxH" of a generated one, or a path.
        peers: which ways, with commas between; "all".
        words: V.
    """

    model: dict[str, Any]
    weights: str
    artifacts: str | None
    export_command: str
    regions: list[int]
    picture: str
    peers: str
    threads: int
    repetitions: int | None
    words: int
    seed: int


def measure(setup: Setup) -> dict[str, Any]:
    """The report: see `peer_rows` for its rows and its summary.

    Raises:
        InputError: an unknown way, an impossible picture, missing weights, artefacts of other
            weights.
        ArtifactError: damaged artefacts or weights.
    """
    manifest = None if setup.artifacts is None else Manifest.load(setup.artifacts)
    ways = choose_ways(setup.peers, artefact_ways(manifest))
    picture, described = read_picture(setup.picture, setup.seed)
    embed_dim = _inspect(setup, manifest, ways)
    height, width = read_image(picture).shape[:2]
    rng = np.random.default_rng(setup.seed)
    boxes = random_boxes(max(3, *setup.regions), height, width, rng)
    inputs = Inputs(picture, boxes, random_words(setup.words, embed_dim, rng))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs.save(folder)
        request = Request(
            setup.model,
            setup.regions,
            setup.artifacts,
            setup.threads,
            setup.repetitions,
            setup.seed,
        )
        (folder / "request.json").write_text(json.dumps(asdict(request)))
        rows = rows_of(
            [_measured(*variant, setup, folder, manifest) for variant in _variants(ways)], folder
        )
    return {
        "benchmark": "peers",
        "conditions": _conditions(setup, described),
        "rows": rows,
        "regions": summary(rows, setup.regions),
    }


def choose_ways(asked: str, exported: Sequence[str]) -> list[str]:
    """ "research,ours" to its parts, "ours" being PyTorch and all that is exported, in the order of
    measuring.

    Raises:
        InputError: nothing, or something that is not there.
    """
    every = [*PEERS, TORCH, *exported]
    groups = {"all": every, OURS: [TORCH, *exported], **{way: [way] for way in every}}
    parts = [part.strip() for part in asked.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in groups]:
        raise InputError(
            f"--peers: there is no {', '.join(unknown)}; choose of {', '.join(groups)}"
            + ("" if exported else ", and of exported runtimes with --artifacts")
        )
    if not parts:
        raise InputError(f"--peers names nothing: choose of {', '.join(groups)}")
    chosen = {way for part in parts for way in groups[part]}
    return [way for way in every if way in chosen]


def artefact_ways(manifest: Manifest | None) -> list[str]:
    """Runtime and precision of what is exported and works on a CPU, such as "openvino_int8"."""
    if manifest is None:
        return []
    on_cpu = [name for name, row in FORMATS.items() if row.runs_on_cpu]
    if others := {entry.format for entry in manifest.graphs} - {*on_cpu, NATIVE}:
        logger.info(f"left out: {', '.join(sorted(others))}, which works on a GPU")
    return [_way(one, precision) for one in on_cpu for precision in manifest.precisions(one)]


def _way(artefact_format: str, precision: str) -> str:
    """What runs these artefacts: "onnx" and "fp32" to "onnxruntime_fp32"."""
    return f"{FORMATS[artefact_format].runtime}_{precision}"


def _inspect(setup: Setup, manifest: Manifest | None, ways: Sequence[str]) -> int:
    """E, after a look whether the weights are there and the artefacts were made of them. Errors as
    `measure`.
    """
    from regionspot.modeling.pipelines import graph_fingerprints
    from regionspot.modeling.presets import create_model

    model = create_model(**setup.model)
    embed_dim: int = model.clip.embed_dim
    if manifest is not None:
        _check_artifacts(setup, manifest, ways, model.name, graph_fingerprints(model))
    del model
    PeakMemory()  # gives what was freed back to the system: the processes need it
    return embed_dim


def _check_artifacts(
    setup: Setup, manifest: Manifest, ways: Sequence[str], name: str, fingerprint: Any
) -> None:
    remedy = f"To export these weights:\n  {setup.export_command}"
    if manifest.model.name != name:
        raise InputError(
            f"the artefacts in {setup.artifacts} are of {manifest.model.name}, not of {name}. "
            f"{remedy}"
        )
    for entry in manifest.graphs:
        used = _way(entry.format, entry.precision) in ways and entry.name in (
            *required_graphs(),
            MASK_GRAPH,
        )
        if used and entry.weights != fingerprint(entry.name):
            raise InputError(
                f"{entry.title} of {setup.artifacts} was made from other weights than "
                f"{setup.weights}, so that its scores could not be compared. {remedy}"
            )


def _conditions(setup: Setup, picture: str) -> dict[str, Any]:
    return conditions(
        **{name: version for name in PACKAGES if (version := version_of(name)) is not None},
        model=setup.model["name"],
        weights=setup.weights,
        picture=picture,
        words=setup.words,
        threads=setup.threads,
        seed=setup.seed,
        includes=INCLUDES,
        memory=MEMORY,
        stages=STAGES,
        statistic="median"
        if setup.repetitions
        else f"median; one run where it takes more than {SLOW_S:.0f} s",
    )


def _variants(ways: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each way, and whether it draws masks: detectors have none."""
    for way in ways:
        yield from ((way, draw) for draw in (False, True) if not (draw and way in DETECTORS))


def _measured(
    way: str, draw: bool, setup: Setup, folder: Path, manifest: Manifest | None
) -> VariantResult:
    """Run one way; a child that fails is a note, not an error."""
    counts: list[int | None] = [None] if way in DETECTORS else list(setup.regions)
    if reason := _what_is_missing(way, draw, manifest):
        logger.info(f"{_title(way, draw)}: {reason}")
        return VariantResult(way, draw, counts, [{"note": reason}])
    logger.info(f"measuring {_title(way, draw)}")
    child = run_module(
        "regionspot.benchmarks.peer_variants",
        variant_name(way, draw),
        folder,
        environment={"OMP_NUM_THREADS": str(setup.threads), "HF_HUB_OFFLINE": "1"},
    )
    notes = [{"note": f"not measured: {_with_hint(child.failure)}"}] if child.failure else []
    return VariantResult(way, draw, counts, [*child.rows, *notes])


def _title(way: str, draw: bool) -> str:
    return f"{way}, {'with masks' if draw else 'labels only'}"


def _with_hint(failure: str) -> str:
    killed = signal.SIGKILL.name in failure
    hint = ", as the system does where memory runs out: try fewer regions" if killed else ""
    return f"{failure}{hint}"


def _what_is_missing(way: str, draw: bool, manifest: Manifest | None) -> str | None:
    """Why a way cannot be measured here; None if it can."""
    needed = (
        "transformers"
        if way in DETECTORS
        else "pycocotools"
        if draw and way in (RESEARCH, CLIP_CROPS)
        else None
    )
    if needed and find_spec(needed) is None:
        return "not measured: pip install 'regionspot[peers]'"
    if manifest is None or way in (*PEERS, TORCH):
        return None
    found = {
        entry.name
        for entry in manifest.graphs
        if entry.usable and _way(entry.format, entry.precision) == way
    }
    wanted = [
        name for name in (*required_graphs(), *([MASK_GRAPH] if draw else [])) if name not in found
    ]
    return (
        f"not measured: {', '.join(wanted)} was not exported for it, or failed its check"
        if wanted
        else None
    )
