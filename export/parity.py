"""Is an artefact equal to the model? Outputs compared name by name, then the whole pipeline on
pictures.

Artefacts run in child processes (`regionspot.runtime.run_graph`): whatever a runtime does, the
answer is a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.errors import ArtifactError
from regionspot.export.parity_inputs import Trial
from regionspot.runtime.engine_file import read_sidecar, sidecar_path
from regionspot.runtime.formats import FORMATS, RUNTIMES
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.run_graph import TIMEOUT_S, graph_request, pipeline_request, run_in_child
from regionspot.runtime.runner import Array
from regionspot.runtime.scores import softmax
from regionspot.runtime.tolerance import Difference, Tolerance, measure, worst

TIE = 1e-4
"""Two classes whose probabilities differ by no more are equally good: either may come out first."""


@dataclass(frozen=True)
class ParityResult:
    """What comparing one graph came to.

    Args:
        passed: None where it could not be run here; `reason` then says why, as it does where it
            failed.
        outputs: the worst of all samples for each output; empty where nothing could be compared.
    """

    tolerance: Tolerance
    passed: bool | None
    reason: str = ""
    outputs: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def worst(self) -> Difference | None:
        """Of all outputs."""
        return worst(list(self.outputs.values())) if self.outputs else None

    def to_json(self) -> dict[str, Any]:
        figures = (
            self.worst.to_json()
            if self.worst
            else dict.fromkeys(("max_abs_diff", "cosine", "sqnr_db"))
        )
        return {
            "passed": self.passed,
            "reason": self.reason,
            "tolerance": self.tolerance.name,
            **figures,
            "outputs": {name: difference.to_json() for name, difference in self.outputs.items()},
        }


@dataclass(frozen=True)
class EndToEndResult:
    """What comparing the whole pipeline came to.

    Args:
        images, regions: how many were recognised.
        top1_agreement: share of regions whose best class is the reference's, or as good as it (see
            TIE).
        score_difference: the largest, of a probability.
    """

    tolerance: Tolerance
    passed: bool | None
    reason: str = ""
    images: int = 0
    regions: int = 0
    top1_agreement: float | None = None
    score_difference: float | None = None

    def to_json(self) -> dict[str, Any]:
        names = ("passed", "reason", "images", "regions", "top1_agreement", "score_difference")
        return {name: getattr(self, name) for name in names} | {"tolerance": self.tolerance.name}


def verify_graph(
    path: Path,
    spec: GraphSpec,
    artefact_format: str,
    precision: str,
    trials: Sequence[Trial],
    threads: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> ParityResult:
    """Run a graph's file in a child process and compare it; never raises for what the runtime
    does.
    """
    row = FORMATS[artefact_format]
    tolerance = row.tolerance(precision)
    if (reason := unavailable_reason(row.runtime, precision, path)) is not None:
        return ParityResult(tolerance, None, reason)
    device = row.parity_device(precision)
    request = graph_request(path, spec, row.runtime, precision, device, threads)
    try:
        return compare(
            spec,
            trials,
            run_in_child(request, [trial.feeds for trial in trials], timeout_s),
            tolerance,
        )
    except ArtifactError as error:
        return ParityResult(tolerance, False, str(error))


def verify_pipeline(
    directory: Path,
    artefact_format: str,
    precision: str,
    trials: Sequence[Trial],
    threads: int | None = None,
    timeout_s: float = TIMEOUT_S,
    native: bool = True,
) -> EndToEndResult:
    """Run the pipeline of a directory of artefacts in a child process and compare it; see
    `verify_graph`.

    Args:
        native: with our own kernels in place of the runtime's graphs, where there are any.
    """
    row = FORMATS[artefact_format]
    tolerance = row.tolerance(precision)
    if (reason := unavailable_reason(row.runtime, precision)) is not None:
        return EndToEndResult(tolerance, None, reason)
    device = row.parity_device(precision)
    request = pipeline_request(
        directory, row.runtime, precision, device, threads, native, artefact_format
    )
    try:
        return compare_pipeline(
            trials, run_in_child(request, [trial.feeds for trial in trials], timeout_s), tolerance
        )
    except ArtifactError as error:
        return EndToEndResult(tolerance, False, str(error))


def compare(
    spec: GraphSpec,
    trials: Sequence[Trial],
    outputs: Sequence[Mapping[str, Array]],
    tolerance: Tolerance,
) -> ParityResult:
    """A verdict on the outputs of a graph, one for each trial.

    Raises:
        ArtifactError: outputs are not those of the spec: names, dtypes, shapes; or not finite.
    """
    found: dict[str, list[Difference]] = {name: [] for name in spec.output_names}
    for trial, actual in zip(trials, outputs, strict=True):
        check_outputs(spec, trial.feeds, actual)
        if tolerance.real_only and not trial.real:
            continue
        for name, differences in found.items():
            differences.append(measure(trial.expected[name], actual[name]))
    worst_of = {name: worst(differences) for name, differences in found.items()}
    breaches = [
        f"{name}: {breach}"
        for name, difference in worst_of.items()
        for breach in tolerance.breaches(difference)
    ]
    return ParityResult(tolerance, not breaches, "; ".join(breaches), worst_of)


def check_outputs(
    spec: GraphSpec, sample: Mapping[str, Array], outputs: Mapping[str, Array]
) -> None:
    """Raises ArtifactError unless the outputs for a sample have the spec's names, dtypes and shapes
    and are finite.
    """
    if set(outputs) != set(spec.output_names):
        raise ArtifactError(
            f"its outputs are {', '.join(sorted(outputs))}, not {', '.join(spec.output_names)}"
        )
    sizes = spec.sizes_of({name: sample[name].shape for name in spec.input_names})
    for tensor in spec.outputs:
        output, shape = outputs[tensor.name], tensor.resolved(sizes)
        if output.dtype != np.dtype(tensor.dtype) or output.shape != shape:
            raise ArtifactError(
                f"{tensor.name} came out as {output.dtype} {output.shape} instead of "
                f"{tensor.dtype} {shape}"
            )
        if not np.isfinite(output).all():
            share = 1 - np.isfinite(output).mean()
            raise ArtifactError(
                f"{share:.1%} of {tensor.name} is NaN or infinite: the precision's range is too "
                "small"
            )


def compare_pipeline(
    trials: Sequence[Trial], outputs: Sequence[Mapping[str, Array]], tolerance: Tolerance
) -> EndToEndResult:
    """A verdict on logits (B, N, V) of the regions that are `valid`.

    Raises:
        ArtifactError: logits of another shape, or not finite.
    """
    agreed: list[Array] = []
    largest, images = 0.0, 0
    for trial, actual in zip(trials, outputs, strict=True):
        wanted, logits = trial.expected["logits"], actual["logits"]
        if logits.shape != wanted.shape or not np.isfinite(logits).all():
            raise ArtifactError(
                f"its logits are {logits.shape} where {wanted.shape} are wanted, or not finite"
            )
        valid = trial.feeds["valid"]
        expected, found = softmax(wanted[valid]), softmax(logits[valid])  # (regions, V)
        chosen = found.argmax(-1)
        agreed.append(expected[np.arange(len(chosen)), chosen] >= expected.max(-1, initial=0) - TIE)
        largest = max(largest, float(np.abs(found - expected).max(initial=0)))
        images += len(valid)
    regions = np.concatenate(agreed)
    agreement = float(regions.mean()) if len(regions) else 1.0
    breaches = tolerance.end_to_end_breaches(agreement, largest)
    return EndToEndResult(
        tolerance, not breaches, "; ".join(breaches), images, len(regions), agreement, largest
    )


def unavailable_reason(runtime: str, precision: str, path: Path | None = None) -> str | None:
    """Returns why this machine cannot run a runtime's artefacts in a precision, or `path`; None if
    it can.
    """
    row = RUNTIMES[runtime]
    if precision in row.gpu_precisions and row.parity_device(precision) == "cpu":
        return (
            f"{runtime} computes {precision} on GPUs only, and there is none here that it can use"
        )
    if not row.needs_cuda:
        return None
    import torch

    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here to run it"
    capabilities: Sequence[int] = ()
    if path is not None and sidecar_path(path).is_file():
        capabilities = read_sidecar(path).compute_capabilities
    major, minor = torch.cuda.get_device_capability()
    if capabilities and 10 * major + minor not in capabilities:
        return f"it is for other GPUs than the one here, of compute capability {major}.{minor}"
    return None
