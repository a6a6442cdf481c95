"""The two sides of a comparison: the weights in PyTorch, or a directory of artefacts in some
runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from regionspot.errors import ArtifactError, InputError
from regionspot.export.divergence import Divergence, OnnxSide, find_divergence
from regionspot.export.parity import (
    EndToEndResult,
    ParityResult,
    compare,
    compare_pipeline,
    unavailable_reason,
)
from regionspot.export.parity_inputs import ParityInputs, Trial
from regionspot.runtime.artifacts import Manifest
from regionspot.runtime.formats import FORMATS, RUNTIMES, model_runtimes
from regionspot.runtime.graph_spec import GraphSpec, Range
from regionspot.runtime.graphs import graph_specs
from regionspot.runtime.opening import choose_artifacts
from regionspot.runtime.run_graph import graph_request, pipeline_request, run_in_child
from regionspot.runtime.runner import Array
from regionspot.runtime.tolerance import (
    PRECISIONS,
    RUNTIME_FP32,
    TOLERANCES,
    Tolerance,
    measure,
)

Outputs = Sequence[Mapping[str, Array]]


@dataclass(frozen=True)
class ParityOperand:
    """What a user wrote, such as "torch" or "artifacts:openvino:int8".

    Args:
        manifest: of the directory; None for PyTorch.
        runtime, format, precision: as artefacts have them; "torch", "torch" and "fp32" for PyTorch.
    """

    manifest: Manifest | None
    runtime: str = "torch"
    format: str = "torch"
    precision: str = "fp32"

    @classmethod
    def parse(cls, text: str) -> ParityOperand:
        """From "torch" or "DIR[:RUNTIME[:PRECISION]]", by default onnxruntime, and the precision
        that the runtime takes on this machine.

        Raises:
            InputError: an unknown runtime or precision.
            ArtifactError: no artefacts there, or none for that runtime in that precision.
        """
        if text == "torch":
            return cls(None)
        directory, runtime, precision = _split(text)
        manifest = Manifest.load(directory)
        device = RUNTIMES[runtime].best_device()
        artefact_format, precision = choose_artifacts(manifest, runtime, precision, device)
        return cls(manifest, runtime, artefact_format, precision)

    @property
    def title(self) -> str:
        """ "artifacts onnxruntime fp32"."""
        return (
            "torch"
            if self.manifest is None
            else f"{self.manifest.directory} {self.runtime} {self.precision}"
        )

    @property
    def tolerance(self) -> Tolerance:
        """How far it may be from the model."""
        return (
            RUNTIME_FP32
            if self.manifest is None
            else FORMATS[self.format].tolerance(self.precision)
        )

    @property
    def _device(self) -> str:
        return RUNTIMES[self.runtime].parity_device(self.precision, FORMATS[self.format].target)

    def specs(self) -> dict[str, GraphSpec] | None:
        """The graphs that it has, with their ranges; None for PyTorch, which has all at any
        size.
        """
        if self.manifest is None:
            return None
        mine = (self.format, self.precision)
        return {
            one.name: one.spec
            for one in self.manifest.graphs
            if (one.format, one.precision) == mine
        }

    def unavailable_reason(self, graph: str | None = None) -> str | None:
        """Returns why it cannot run on this machine; None if it can."""
        if self.manifest is None:
            return None
        entry = self.manifest.get(graph, self.format, self.precision) if graph else None
        return unavailable_reason(
            self.runtime, self.precision, self.manifest.verify(entry) if entry else None
        )

    def spec_of(self, shared: GraphSpec) -> GraphSpec:
        """The types of this side's graph, at the sizes that both sides take."""
        own = (self.specs() or {}).get(shared.name, shared)
        return replace(own, ranges=shared.ranges)

    def run(self, spec: GraphSpec, trials: Sequence[Trial], threads: int | None) -> Outputs:
        """A graph's outputs; trials expect what PyTorch gives. Raises ArtifactError where it does
        not run.
        """
        if self.manifest is None:
            return [trial.expected for trial in trials]
        entry = self.manifest.find(spec.name, self.format, self.precision)
        path, own = self.manifest.verify(entry), self.spec_of(spec)
        request = graph_request(path, own, self.runtime, self.precision, self._device, threads)
        return run_in_child(request, [trial.feeds for trial in trials])

    def onnx_side(self, graph: str, threads: int | None) -> OnnxSide:
        """A graph's file, for `find_divergence`. Raises ArtifactError where it is damaged."""
        assert self.manifest is not None
        path = self.manifest.verify(self.manifest.find(graph, self.format, self.precision))
        return OnnxSide(path, self.precision, self._device, threads)

    def run_pipeline(self, trials: Sequence[Trial], threads: int | None) -> Outputs:
        """Logits of the whole pipeline; as `run`."""
        if self.manifest is None:
            return [trial.expected for trial in trials]
        request = pipeline_request(
            self.manifest.directory,
            self.runtime,
            self.precision,
            self._device,
            threads,
            artefact_format=self.format,
        )
        return run_in_child(request, [trial.feeds for trial in trials])


def onnx_operands(a: ParityOperand, b: ParityOperand) -> tuple[ParityOperand, ParityOperand]:
    """The sides as ONNX files, whose intermediate values can be seen: PyTorch's own have no names
    in common with them, so that the other side's file in fp32 stands for it.

    Raises:
        InputError: a side shows no intermediate values, or is its own stand-in.
    """
    if a.manifest is None and b.manifest is None:
        raise InputError("both sides are torch: compare it with a directory of artefacts")
    for side in (a, b):
        _check_shows_values(side)
    sides = (_as_onnx(a, b), _as_onnx(b, a))
    if None in (a.manifest, b.manifest) and sides[0] == sides[1]:
        raise InputError(
            "--bisect takes the ONNX file in fp32 for torch, which is the other side here: leave "
            "out --bisect, or name another precision, such as DIR:onnxruntime:fp16"
        )
    return sides


def _as_onnx(side: ParityOperand, other: ParityOperand) -> ParityOperand:
    """The side, or for PyTorch the other's files in fp32. Raises InputError where there are
    none.
    """
    if side.manifest is not None:
        return side
    stand_in = replace(other, precision="fp32")
    if not stand_in.specs():
        raise InputError(
            f"--bisect takes the ONNX file in fp32 for torch, and there is none beside "
            f"{other.title}: make it with regionspot-export --{FORMATS[other.format].option} "
            "--precision fp32"
        )
    return stand_in


def _check_shows_values(side: ParityOperand) -> None:
    """Raises InputError for a runtime other than ONNX Runtime."""
    if side.manifest is not None and side.runtime != "onnxruntime":
        directory = side.manifest.directory
        raise InputError(
            f"{side.runtime} fuses operators and shows no values between them, so that --bisect "
            "has nothing to compare: compare the ONNX files that its artefacts are made from, "
            f"such as {directory}:onnxruntime:fp32 with {directory}:onnxruntime:fp16"
        )


def bisect_graph(
    a: ParityOperand,
    b: ParityOperand,
    spec: GraphSpec,
    inputs: ParityInputs,
    threads: int | None = None,
) -> Divergence | str:
    """Where B parts from A within one graph, on the inputs for which its outputs are furthest
    apart; or why that cannot be told here.

    Args:
        a, b: of `onnx_operands`.
    """
    tolerance = looser(a, b)
    try:
        if (
            reason := a.unavailable_reason(spec.name) or b.unavailable_reason(spec.name)
        ) is not None:
            return reason
        trials = inputs.trials(spec)
        outputs = a.run(spec, trials, threads), b.run(spec, trials, threads)
        judged = [
            (_output_sqnr(*pair), trial)
            for trial, *pair in zip(trials, *outputs, strict=True)
            if trial.real or not tolerance.real_only
        ]
        _, worst_trial = min(judged, key=lambda item: item[0])
        files = (a.onnx_side(spec.name, threads), b.onnx_side(spec.name, threads))
        return find_divergence(*files, spec, worst_trial.feeds, tolerance)
    except ArtifactError as error:
        return str(error)


def _output_sqnr(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    """The lowest of all outputs; that of what is not finite is below all others."""
    if not all(np.isfinite(side[name]).all() for side in (a, b) for name in a):
        return float("-inf")
    return min(measure(a[name], b[name]).sqnr_db for name in a)


def shared_specs(a: ParityOperand, b: ParityOperand) -> dict[str, GraphSpec]:
    """The graphs that both sides have, with the sizes that both take, in the order in which data
    flows.

    Raises:
        InputError: there is none, or both sides are PyTorch, or of different models.
    """
    manifests = [side.manifest for side in (a, b) if side.manifest is not None]
    if not manifests:
        raise InputError("both sides are torch: compare it with a directory of artefacts")
    if len({manifest.model.name for manifest in manifests}) > 1:
        names = " and ".join(manifest.model.name for manifest in manifests)
        raise InputError(
            f"the two directories are of different models, {names}: compare artefacts of one model"
        )
    of_sides = [specs for side in (a, b) if (specs := side.specs()) is not None]
    shared = {}
    for name in graph_specs(manifests[0].model):
        of_name = [specs[name] for specs in of_sides if name in specs]
        if len(of_name) == len(of_sides):
            shared[name] = replace(of_name[0], ranges=_common_ranges(of_name))
    if not shared:
        raise InputError("the two sides have no graph in common: export the same graphs for both")
    return shared


def compare_graph(
    a: ParityOperand,
    b: ParityOperand,
    spec: GraphSpec,
    inputs: ParityInputs,
    threads: int | None = None,
) -> ParityResult:
    """How far B is from A in one graph; never raises for what a runtime does."""
    tolerance = looser(a, b)
    try:
        if (
            reason := a.unavailable_reason(spec.name) or b.unavailable_reason(spec.name)
        ) is not None:
            return ParityResult(tolerance, None, reason)
        trials = inputs.trials(spec)
        expected = [
            replace(trial, expected=of_a)
            for trial, of_a in zip(trials, a.run(spec, trials, threads), strict=True)
        ]
        return compare(b.spec_of(spec), expected, b.run(spec, trials, threads), tolerance)
    except ArtifactError as error:
        return ParityResult(tolerance, False, str(error))


def compare_pipelines(
    a: ParityOperand,
    b: ParityOperand,
    recognizer: GraphSpec,
    with_text: bool,
    inputs: ParityInputs,
    threads: int | None = None,
) -> EndToEndResult:
    """How far B is from A end to end; arguments as `ParityInputs.pipeline_trials`."""
    tolerance = looser(a, b)
    try:
        if (reason := a.unavailable_reason() or b.unavailable_reason()) is not None:
            return EndToEndResult(tolerance, None, reason)
        trials = inputs.pipeline_trials(recognizer, with_text)
        expected = [
            replace(trial, expected=of_a)
            for trial, of_a in zip(trials, a.run_pipeline(trials, threads), strict=True)
        ]
        return compare_pipeline(expected, b.run_pipeline(trials, threads), tolerance)
    except ArtifactError as error:
        return EndToEndResult(tolerance, False, str(error))


def looser(a: ParityOperand, b: ParityOperand) -> Tolerance:
    """The tolerance of the side that may be further from the model."""
    order = list(TOLERANCES)
    return max((a.tolerance, b.tolerance), key=lambda tolerance: order.index(tolerance.name))


def _split(text: str) -> tuple[str, str, str | None]:
    """ "DIR:RUNTIME:PRECISION" to its parts; a directory may have colons in its name."""
    rest, _, last = text.rpartition(":")
    precision = None
    if rest and last in PRECISIONS:
        precision, text = last, rest
        rest, _, last = text.rpartition(":")
    if rest and last in model_runtimes():
        return rest, last, precision
    if rest and not Path(text).is_dir() and Path(rest.split(":")[0]).is_dir():
        raise InputError(
            f"{text!r} names no runtime after its directory: write DIR:RUNTIME:PRECISION with one "
            f"of {', '.join(model_runtimes())} and one of {', '.join(PRECISIONS)}"
        )
    return text, "onnxruntime", precision


def _common_ranges(specs: Sequence[GraphSpec]) -> dict[str, Range]:
    common = {}
    for axis in specs[0].ranges:
        ranges = [spec.ranges[axis] for spec in specs]
        low, high = max(one.min for one in ranges), min(one.max for one in ranges)
        if low > high:
            both = " and ".join(map(str, ranges))
            raise InputError(
                f"{specs[0].name}: the sides take no {axis} of one size, {both}: export with equal "
                "ranges"
            )
        common[axis] = Range(low, min(max(ranges[0].opt, low), high), high)
    return common
