"""What an export makes, in which order, and what it will take: sizes and memory, from parameter
counts alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from regionspot.errors import InputError
from regionspot.files import in_units
from regionspot.modeling.checkpoint import load_head
from regionspot.modeling.graphs import module_class
from regionspot.modeling.head import RegionHead
from regionspot.modeling.presets import MINI, MINI_HEAD, create_backbones
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.formats import FORMATS, GPU, MODEL, Format
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.graphs import Role, graph_named
from regionspot.runtime.tolerance import PRECISIONS
from regionspot.tables import text_table

# of a weight; int8 and fp8 have scales, and keep biases
_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.1, "fp8": 1.1}
HALF_ON_GPU = ("fp16", "int8", "fp8")
"""Precisions whose graphs compute in fp16, all or the rest of them, where they are for GPUs."""

TRIAL_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Of activations in one run of a comparison, by the device that the model computes on."""

_LIBRARIES_BYTES = 0.4 * 2**30  # of PyTorch and ONNX, loaded


@dataclass(frozen=True)
class Step:
    """One artefact to make. `source` is the one of the same graph that it is made from."""

    spec: GraphSpec
    format: str
    precision: str
    source: Step | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.spec.name, self.format, self.precision

    @property
    def title(self) -> str:
        return f"{self.spec.name} {self.format} {self.precision}"

    @property
    def file(self) -> str:
        """Relative to the directory of artefacts."""
        return f"{self.format}/{self.precision}/{self.spec.name}{FORMATS[self.format].suffix}"


def make_plan(
    specs: Sequence[GraphSpec],
    formats: Iterable[str],
    precisions: Collection[str] | None,
    gpu_specs: Mapping[str, GraphSpec] | None = None,
) -> tuple[Step, ...]:
    """All that `formats` and `precisions` ask for of some graphs, and what those are made from,
    sources first.

    A format that is made from the model in several precisions is made in single precision first,
    and converted to the others; every other format is made from its source in the same precision.
    Weights for our own kernels are in fp32 only.

    Args:
        specs: the graphs to export.
        precisions: None stands for the first of each format's own.
        gpu_specs: the same graphs in formats for GPUs, by name, where these have other sizes.

    Raises:
        InputError: a format is not made in one of the precisions.
    """

    def spec_for(spec: GraphSpec, row: Format) -> GraphSpec:
        return spec if gpu_specs is None or row.target != GPU else gpu_specs[spec.name]

    asked = set(formats)
    rows = [row for row in FORMATS.values() if row.name in asked]
    _check_precisions(rows, precisions or ())
    needed = {row.made_from for row in rows}
    sources = [
        row for row in FORMATS.values() if row.name in needed | asked and _is_source(row.name)
    ]
    steps = []
    for spec in specs:
        of_graph = [row for row in rows if row.graphs is None or spec.name in row.graphs]
        for source in sources:
            made = [row for row in of_graph if row.made_from == source.name]
            wanted = _precisions([source, *made] if source.name in asked else made, precisions)
            sized = spec_for(spec, source)
            exported = Step(sized, source.name, "fp32")
            steps.append(exported)
            for precision in wanted:
                converted = exported
                typed = on_gpu(sized, precision) if source.target == GPU else sized
                if precision != "fp32":
                    converted = Step(typed, source.name, precision, exported)
                    steps.append(converted)
                steps += [
                    Step(typed, row.name, precision, converted)
                    for row in made
                    if precision in _precisions([row], precisions)
                ]
        steps += [
            Step(spec_for(spec, row), row.name, "fp32")
            for row in of_graph
            if row.made_from == MODEL and row not in sources
        ]
    return tuple(steps)


def _check_precisions(rows: Iterable[Format], precisions: Iterable[str]) -> None:
    """Raises InputError where a format with an option of its own is not made in a precision."""
    for precision in precisions:
        unable = [row.name for row in rows if row.option and precision not in row.precisions]
        if unable:
            able = [f"--{row.option}" for row in FORMATS.values() if precision in row.precisions]
            raise InputError(
                f"{', '.join(unable)} graphs are for CPUs, which do not compute in {precision}: "
                f"leave it out of --precision, or ask for {', '.join(able)} alone"
            )


def on_gpu(spec: GraphSpec, precision: str) -> GraphSpec:
    """The graph with the types that its tensors have in a format for GPUs."""
    return spec.with_half_tensors() if precision in HALF_ON_GPU else spec


def _is_source(name: str) -> bool:
    """Whether other formats are made from it; it is converted to other precisions itself, too."""
    return any(row.made_from == name for row in FORMATS.values())


def _precisions(rows: Iterable[Format], asked: Collection[str] | None) -> list[str]:
    wanted = {row.precision for row in rows} if asked is None else set(asked)
    return [precision for precision in PRECISIONS if precision in wanted]


def choose_graphs(specs: Mapping[str, GraphSpec], names: str | None) -> tuple[GraphSpec, ...]:
    """The graphs that `--graphs` names, in the order of `specs`.

    Args:
        names: with commas between, or "all"; None stands for all but combined ones.

    Raises:
        InputError: an unknown name.
    """
    if names is None:
        return tuple(
            spec for spec in specs.values() if graph_named(spec.name).role is not Role.COMBINED
        )
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in asked if name != "all" and name not in specs]:
        raise InputError(
            f"there is no graph {', '.join(unknown)}: choose of {', '.join(specs)}, or all"
        )
    if not asked:
        raise InputError(f"no graph is named: choose of {', '.join(specs)}, or all")
    return tuple(spec for spec in specs.values() if "all" in asked or spec.name in asked)


def choose_precisions(text: str) -> tuple[str, ...]:
    """ "fp32,fp16" to its parts, in the order of PRECISIONS. Raises InputError for others."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked or set(asked) - set(PRECISIONS):
        raise InputError(
            f"{text!r} is not one or more of {', '.join(PRECISIONS)}, with commas between"
        )
    return tuple(precision for precision in PRECISIONS if precision in asked)


def check_libraries(formats: Iterable[str]) -> None:
    """Raises InputError unless what makes these formats is installed; says how to install it."""
    asked = [FORMATS[name] for name in formats]
    sources = [FORMATS[row.made_from] for row in asked if row.made_from in FORMATS]
    for row in dict.fromkeys((*sources, *asked)):
        if missing := [name for name in row.modules if find_spec(name) is None]:
            raise InputError(f"{row.name} artefacts need {', '.join(missing)}: {row.install}")


def sizing_model(name: str, head_weights: str | Path | None = None) -> RegionSpot:
    """The model without any weight in memory: it knows shapes alone, and takes a moment at any
    size.

    Args:
        head_weights: where the head's sizes are read; None stands for the preset's own.
    """
    if head_weights is None and name == MINI:
        head_weights = MINI_HEAD
    head = None if head_weights is None else load_head(head_weights).to("meta")
    with torch.device("meta"):
        sam, clip = create_backbones(name, random_weights=0)
        return RegionSpot(
            sam, clip, head or RegionHead(sam.token_dim, clip.width, clip.embed_dim), name
        )


@dataclass(frozen=True)
class Estimate:
    """Of one step. Files are estimated from parameter counts; memory is that of making and
    verifying it, at most.
    """

    step: Step
    file_bytes: int
    memory_bytes: int


def estimate(steps: Sequence[Step], model: RegionSpot) -> list[Estimate]:
    """What each step will take; `model` may be a `sizing_model`."""
    resident = _parameter_bytes([model.sam.sam, model.clip.clip, model.head])
    found = []
    for step in steps:
        weights = _parameter_bytes(module_class(step.spec.name).weights(model))
        at_work = (
            _LIBRARIES_BYTES
            + FORMATS[step.format].weight_copies * weights
            + activation_bytes(
                step.spec, model, affordable(step.spec, model, step.spec.sizes("opt"))
            )
        )
        found.append(
            Estimate(step, round(weights / 4 * _BYTES[step.precision]), round(resident + at_work))
        )
    return found


def affordable(spec: GraphSpec, model: RegionSpot, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes for a comparison: fewer images, then fewer prompts, where the activations of `sizes`
    would take more than `TRIAL_BYTES`.
    """
    found = dict(sizes)
    limit = TRIAL_BYTES["cpu" if model.device.type != "cuda" else "cuda"]
    for axis in ("batch", "prompts"):
        least = spec.ranges[axis].min if axis in spec.ranges else found.get(axis, 0)
        while found.get(axis, 0) > least and activation_bytes(spec, model, found) > limit:
            found[axis] = max(found[axis] // 2, least)
    return found


def activation_bytes(spec: GraphSpec, model: RegionSpot, sizes: Mapping[str, int]) -> float:
    """The largest activations of one run in single precision: a rough figure.

    Inputs, outputs, and what outweighs the rest: attention over a whole image and the token
    decoder's probabilities, each twice, for the scores and their softmax.

    Args:
        sizes: of the dynamic axes.
    """
    held = sum(math.prod(tensor.resolved(sizes)) for tensor in (*spec.inputs, *spec.outputs))
    return 4.0 * (held + 2 * module_class(spec.name).activation_elements(model, sizes))


def _parameter_bytes(modules: Iterable[nn.Module]) -> int:
    """In single precision."""
    return 4 * sum(parameter.numel() for module in modules for parameter in module.parameters())


def format_plan(estimates: Sequence[Estimate]) -> str:
    """An aligned table: graph, format, precision, file and its size, what it is made from,
    memory.
    """
    header = ("graph", "format", "precision", "size", "made from", "memory", "file")
    rows = [
        (
            one.step.spec.name,
            one.step.format,
            one.step.precision,
            in_units(one.file_bytes),
            f"{one.step.source.format} {one.step.source.precision}"
            if one.step.source
            else "PyTorch",
            in_units(one.memory_bytes),
            one.step.file,
        )
        for one in estimates
    ]
    total = in_units(sum(one.file_bytes for one in estimates))
    most = in_units(max((one.memory_bytes for one in estimates), default=0))
    summary = f"{len(estimates)} artefacts, about {total} in all; memory at most about {most}"
    return f"{text_table(header, rows)}\n\n{summary}"
