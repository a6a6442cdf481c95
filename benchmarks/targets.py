"""What can be measured here: runtimes and precisions, by names such as "openvino_int8"."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.errors import InputError
from regionspot.runtime.artifacts import GraphEntry, Manifest
from regionspot.runtime.formats import RUNTIMES
from regionspot.runtime.opening import open_pipeline

if TYPE_CHECKING:
    from regionspot.modeling.regionspot import RegionSpot
    from regionspot.runtime.pipeline import RegionPipeline

REFERENCE = "torch_fp32"
TORCH_BF16, TORCH_ON_CUDA = "torch_bf16", "torch-compile_bf16"
"""In bf16, where the device has instructions for it; and compiled besides."""


@dataclass(frozen=True)
class Target:
    """A runtime and a precision.

    Args:
        runtime: "torch", "torch-compile", or what opens artefacts.
        graphs: that were exported; None for a model, which has them all.
    """

    runtime: str
    precision: str
    graphs: frozenset[str] | None = None

    @property
    def name(self) -> str:
        return f"{self.runtime}_{self.precision}"

    @property
    def in_torch(self) -> bool:
        return self.runtime.startswith("torch")

    def has(self, graphs: Collection[str]) -> bool:
        """Whether all of these graphs can be run."""
        return self.graphs is None or self.graphs.issuperset(graphs)


def available_targets(manifest: Manifest | None, cuda: bool) -> list[Target]:
    """PyTorch, and every artefact whose runtime is installed and finds its device."""
    names = [
        REFERENCE,
        *([TORCH_BF16] if cuda or cpu_has_bf16() else []),
        *([TORCH_ON_CUDA] if cuda else []),
    ]
    found = [
        Target(runtime, precision) for runtime, precision in (name.split("_") for name in names)
    ]
    if manifest is None:
        return found
    for runtime in RUNTIMES.values():
        installed = all(find_spec(module) is not None for module in runtime.modules)
        if not runtime.whole_models or not installed or (runtime.needs_cuda and not cuda):
            continue
        made: dict[str, list[GraphEntry]] = {}  # precision -> graphs, of the format that is opened
        for name in runtime.own_formats(runtime.best_device()):
            for precision in manifest.precisions(name):
                kind = name, precision
                graphs = [one for one in manifest.graphs if (one.format, one.precision) == kind]
                made.setdefault(precision, graphs)
        found += [
            Target(runtime.name, precision, frozenset(one.name for one in graphs if one.usable))
            for precision, graphs in made.items()
        ]
    return found


def cpu_has_bf16() -> bool:
    """Tells whether the CPU multiplies in bf16; on others PyTorch takes several times as long as in
    fp32.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"}.intersection(flags))


def choose_targets(asked: str, available: Sequence[Target]) -> list[Target]:
    """Those of a list such as "torch_fp32,openvino_int8", or of "all".

    Raises:
        InputError: one is not available.
    """
    names = [part.strip() for part in asked.split(",") if part.strip()]
    by_name = {target.name: target for target in available}
    if "all" in names:
        return list(available)
    if unknown := [name for name in names if name not in by_name]:
        raise InputError(
            f"--targets: {', '.join(unknown)} cannot be measured here; there are "
            f"{', '.join(by_name)}. Exported graphs need --artifacts, and their runtime installed"
        )
    if not names:
        raise InputError(f"--targets names nothing: choose of {', '.join(by_name)}, or all")
    return [target for target in available if target.name in names]


@contextmanager
def open_target(
    target: Target,
    model: Mapping[str, Any],
    artifacts: str | None,
    device: str,
    threads: int | None,
) -> Iterator[RegionSpot | RegionPipeline]:
    """What a target is measured with; PyTorch is loaded only where it is what runs.

    Args:
        model: arguments of `create_model`, for targets in PyTorch.
        artifacts: directory of artefacts, for the others.
        device, threads: as `open_pipeline` and `resolve_device` take them.

    Raises:
        InputError, ArtifactError: it cannot be opened.
    """
    if not target.in_torch:
        with open_pipeline(
            artifacts or "", target.runtime, target.precision, threads, device
        ) as pipeline:
            yield pipeline
        return
    import torch

    from regionspot.modeling.pipelines import pipeline_from_model
    from regionspot.modeling.presets import create_model

    if threads:
        torch.set_num_threads(threads)
    opened = create_model(**model, device=device, dtype=target.precision)
    if target.runtime == "torch-compile":
        yield pipeline_from_model(opened, compiled=True)
    else:
        yield opened
