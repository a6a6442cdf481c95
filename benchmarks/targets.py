"""What can be measured here: runtimes and precisions, by names such as "openvino_int8"."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from regionspot.errors import InputError
from regionspot.runtime.artifacts import Manifest
from regionspot.runtime.runtimes import FORMAT_RUNTIME, FORMATS

REFERENCE = "torch_fp32"
TORCH_ON_CUDA = ("torch_bf16", "torch-compile_bf16")
"""Under autocast, and with both encoders compiled besides."""

_MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}
_MODULES |= {"tensorrt-rtx": "tensorrt_rtx_bindings"}
NEED_CUDA = ("tensorrt", "tensorrt-rtx")


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
    found = [Target(*name.split("_")) for name in (REFERENCE, *(TORCH_ON_CUDA if cuda else ()))]
    if manifest is None:
        return found
    for one in FORMATS:
        runtime = FORMAT_RUNTIME[one]
        if find_spec(_MODULES[runtime]) is None or (runtime in NEED_CUDA and not cuda):
            continue
        for precision in manifest.precisions(one):
            entries = [entry for entry in manifest.graphs if (entry.format, entry.precision) == (one, precision)]
            found.append(Target(runtime, precision, frozenset(entry.name for entry in entries if entry.usable)))
    return found


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
            f"--targets: {', '.join(unknown)} cannot be measured here; there are {', '.join(by_name)}. Exported "
            "graphs need --artifacts, and their runtime installed"
        )
    if not names:
        raise InputError(f"--targets names nothing: choose of {', '.join(by_name)}, or all")
    return [target for target in available if target.name in names]
