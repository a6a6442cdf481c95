"""A TensorRT engine on disk: the plan exactly as it was built, and beside it a JSON sidecar that
says what it is.

    region_head.plan    of TensorRT, .engine of TensorRT-RTX: nothing in front, so that trtexec and
                        Triton read it too
    region_head.json    flavour, versions, GPUs, tensors with their profile, checksums of the plan
                        and of its ONNX file

Imports no TensorRT: a manifest or a server's configuration is made of the sidecar anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regionspot.errors import ArtifactError, InputError
from regionspot.files import READ_BYTES, write_atomically
from regionspot.runtime.graph_spec import BOUNDS, GraphSpec, TensorSpec
from regionspot.runtime.signature import check_signature

FORMAT = 1
DYNAMIC = -1
"""A dynamic axis, in TensorRT's shapes."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's two TensorRTs, which share their Python API but not their engines.

    Args:
        title: as people call it.
        module: the Python module.
        suffix: of an engine's file.
        install: how to get it.
    """

    title: str
    module: str
    suffix: str
    install: str


FLAVOURS = {
    "tensorrt": Flavour(
        title="TensorRT",
        module="tensorrt",
        suffix=".plan",
        install="pip install --extra-index-url https://pypi.nvidia.com 'regionspot[tensorrt]' "
        "(PyPI's own tensorrt is a stub that downloads the libraries from there), or work "
        "in one of NVIDIA's containers",
    ),
    "tensorrt-rtx": Flavour(
        title="TensorRT-RTX",
        module="tensorrt_rtx_bindings",
        suffix=".engine",
        install="pip install 'regionspot[tensorrt-rtx]' (tensorrt_rtx-cu13-bindings and "
        "tensorrt_rtx-cu13-libs)",
    ),
}


HARDWARE_LEVELS = ("ampere_plus", "same_compute_capability")
"""Names of TensorRT's `HardwareCompatibilityLevel`, in lower case: an engine for every GPU from
Ampere on, or for all models of GPU with the compute capability of the one that it was built on.
"""


def flavour_named(name: str) -> Flavour:
    """Raises InputError for a name that is neither "tensorrt" nor "tensorrt-rtx"."""
    if name not in FLAVOURS:
        raise InputError(
            f"there is no TensorRT flavour {name!r}: choose one of {', '.join(FLAVOURS)}"
        )
    return FLAVOURS[name]


@dataclass(frozen=True)
class EngineTensor:
    """An input or output as the engine has it.

    Args:
        dtype: numpy's name.
        shape: -1 where an axis is dynamic.
        profile: the smallest, the best and the largest shape of an input; None for an output.
    """

    name: str
    dtype: str
    shape: Shape
    profile: tuple[Shape, Shape, Shape] | None = None

    def as_spec(self) -> TensorSpec:
        """The tensor in a graph's terms, its dynamic axes without names."""
        shape = tuple("?" if size == DYNAMIC else size for size in self.shape)
        return TensorSpec(self.name, self.dtype, shape)


@dataclass(frozen=True)
class BuildHost:
    """The machine that a TensorRT engine was built on.

    Args:
        compute_capability: of its GPU, 89 for 8.9.
        driver: version of NVIDIA's driver; None where it could not be read.
        cuda: version of the CUDA runtime of PyTorch there.
    """

    compute_capability: int
    driver: str | None
    cuda: str | None


@dataclass(frozen=True)
class EngineSidecar:
    """What an engine is.

    Args:
        graph: the name of its `GraphSpec`.
        flavour: a key of `FLAVOURS`.
        file, size_bytes, sha256: the engine beside it.
        versions: of TensorRT, its ONNX parser and regionspot, by name.
        compute_capabilities: the GPUs that an RTX engine is built for, 89 for 8.9; empty for
            TensorRT.
        device: the GPU that a TensorRT engine was tuned on; None for TensorRT-RTX, which tunes
            where it runs.
        optimization_level: of the builder, 0 to 5.
        workspace_mib: bound of the memory beside weights, inputs and outputs; None where none was
            asked for.
        build_s: seconds that parsing and building took.
        inputs, outputs: the tensors.
        onnx: sha256 of the ONNX file and of its external data, by file name.
        warnings: what TensorRT warned of.
        layers: the kernels in figures, as of `regionspot.export.trt_layers.LayerReport`; empty
            where the builder does not list them.
        scratch_mib: memory for activations that a context of the largest shapes needs, in MiB; None
            in older sidecars, and where the builder does not tell.
        version_compatible: whether later releases of TensorRT load it, by code that it carries.
        hardware_compatibility: one of `HARDWARE_LEVELS`, or None.
        built_on: of a TensorRT engine; None for TensorRT-RTX, and in older sidecars.
    """

    graph: str
    flavour: str
    file: str
    size_bytes: int
    sha256: str
    versions: dict[str, str]
    compute_capabilities: tuple[int, ...]
    device: str | None
    optimization_level: int
    workspace_mib: int | None
    build_s: float
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    onnx: dict[str, str]
    warnings: tuple[str, ...] = ()
    layers: dict[str, Any] = field(default_factory=dict)
    scratch_mib: float | None = None
    version_compatible: bool = False
    hardware_compatibility: str | None = None
    built_on: BuildHost | None = None

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EngineSidecar:
        """Raises KeyError, TypeError or ValueError unless `content` came from `to_json`."""
        fields = dict(content)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        if fields["flavour"] not in FLAVOURS:
            raise ValueError(f"unknown flavour {fields['flavour']}")
        if fields.get("hardware_compatibility") not in (None, *HARDWARE_LEVELS):
            raise ValueError(f"unknown hardware compatibility {fields['hardware_compatibility']}")
        if fields.get("built_on") is not None:
            fields["built_on"] = BuildHost(**fields["built_on"])
        for key in ("inputs", "outputs"):
            fields[key] = tuple(_tensor_from_json(tensor) for tensor in fields[key])
        fields["compute_capabilities"] = tuple(fields["compute_capabilities"])
        fields["warnings"] = tuple(fields["warnings"])
        return cls(**fields)


def _tensor_from_json(content: Mapping[str, Any]) -> EngineTensor:
    profile = content["profile"]
    if profile is not None:
        smallest, best, largest = (tuple(shape) for shape in profile)
        profile = (smallest, best, largest)
    return EngineTensor(content["name"], content["dtype"], tuple(content["shape"]), profile)


def profile_of(spec: GraphSpec) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The (min, opt, max) shape of each input: every dynamic axis at its range's ends."""
    smallest, best, largest = (spec.sizes(bound) for bound in BOUNDS)
    return {
        tensor.name: (tensor.resolved(smallest), tensor.resolved(best), tensor.resolved(largest))
        for tensor in spec.inputs
    }


def sidecar_path(engine: Path) -> Path:
    return engine.with_suffix(".json")


def write_engine(path: Path, plan: bytes, sidecar: EngineSidecar) -> None:
    """The plan untouched, then the sidecar: where that is, both are whole.

    Raises:
        ArtifactError: they cannot be written.
    """
    with contextlib.suppress(OSError):  # never an old sidecar beside a new plan
        sidecar_path(path).unlink()
    write_atomically(path, plan)
    write_atomically(sidecar_path(path), (json.dumps(sidecar.to_json(), indent=2) + "\n").encode())


def read_sidecar(engine: Path) -> EngineSidecar:
    """The sidecar of an engine.

    Raises:
        ArtifactError: it is missing, or is none.
    """
    path = sidecar_path(engine)
    try:
        return EngineSidecar.from_json(json.loads(path.read_bytes()))
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path} ({error.strerror}): an engine is its plan and this sidecar, copy "
            "both or export again"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not an engine's sidecar ({error}): export {engine.name} again"
        ) from error


def read_engine(path: Path, spec: GraphSpec, flavour: str) -> tuple[bytes, EngineSidecar]:
    """An engine's bytes and its sidecar, checked against each other, the flavour and the spec.

    Raises:
        InputError: it is of the other flavour.
        ArtifactError: a file is missing, damaged, of another graph, or its tensors are not the
            spec's.
    """
    wanted = flavour_named(flavour)
    sidecar = read_sidecar(path)
    if sidecar.flavour != flavour:
        raise InputError(
            f"{path} is an engine of {flavour_named(sidecar.flavour).title}, which {wanted.title} "
            f"cannot run: open it with the runtime {sidecar.flavour}, or export an engine for "
            f"{flavour}"
        )
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"cannot read the engine {path}: {error.strerror}. Export it again."
        ) from error
    if len(plan) != sidecar.size_bytes or hashlib.sha256(plan).hexdigest() != sidecar.sha256:
        raise ArtifactError(
            f"{path} is damaged, or not the engine that {sidecar_path(path).name} describes: copy "
            "both anew, or export again"
        )
    if sidecar.graph != spec.name:
        raise ArtifactError(
            f"{path} is the graph {sidecar.graph}, not {spec.name}: open the right file"
        )
    check_tensors(path, spec, sidecar.inputs, sidecar.outputs)
    return plan, sidecar


def check_tensors(
    path: Path, spec: GraphSpec, inputs: Sequence[EngineTensor], outputs: Sequence[EngineTensor]
) -> None:
    """Raises ArtifactError unless the tensors are the spec's."""
    check_signature(
        spec,
        [tensor.as_spec() for tensor in inputs],
        [tensor.as_spec() for tensor in outputs],
        path,
    )


def file_sha256(path: Path) -> str:
    """Raises OSError where the file cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
