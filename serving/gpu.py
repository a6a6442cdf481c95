"""What a repository asks of the GPU that serves it: memory, and a TensorRT that loads its
engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from regionspot.errors import ArtifactError
from regionspot.files import in_units
from regionspot.runtime.artifacts import GraphEntry
from regionspot.runtime.engine_compatibility import why_not_loadable
from regionspot.runtime.engine_file import EngineSidecar, read_sidecar
from regionspot.runtime.graph_spec import GraphSpec, TensorSpec
from regionspot.runtime.nvidia import Gpu, read_driver
from regionspot.runtime.pipeline import SAM_IMAGE_GRAPHS
from regionspot.serving.contract import GPU_INDEX, WORKERS, Limits
from regionspot.serving.deploy.tensorrt_packages import tensorrt_version

CONTEXT_BYTES = 600 << 20
"""What CUDA's context and the kernels of libraries take on a GPU, roughly."""


@dataclass(frozen=True)
class GpuMemory:
    """Memory that a server takes on the GPU, in bytes. Activations of ONNX Runtime are not known
    before it runs.

    Args:
        weights: of all engines or ONNX files.
        scratch: that TensorRT sets aside for each engine's largest sizes.
        tensors: buffers of each engine's largest inputs and outputs.
        pool: Triton's pool for tensors that stay on the GPU: encoded images, those in the cache and
            those at work.
        unmeasured: graphs of which no scratch is known.
    """

    weights: int
    scratch: int
    tensors: int
    pool: int
    unmeasured: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return CONTEXT_BYTES + self.weights + self.scratch + self.tensors + self.pool

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "scratch": self.scratch,
            "inputs and outputs": self.tensors,
            "encoded images": self.pool,
            "CUDA": CONTEXT_BYTES,
        }
        told = ", ".join(f"{in_units(size)} {name}" for name, size in parts.items())
        unknown = (
            f"; without the activations of {', '.join(self.unmeasured)}" if self.unmeasured else ""
        )
        return f"{in_units(self.total)} of GPU memory ({told}{unknown})"


@dataclass(frozen=True)
class GraphsOnGpu:
    """The graphs of a repository's target that run on a GPU. The sidecars of engines are read once.

    Args:
        entries: of the graphs.
        directory: where their files lie.
        limits: of requests, with the size of the cache of encoded images.
    """

    entries: Sequence[GraphEntry]
    directory: Path
    limits: Limits

    @cached_property
    def engines(self) -> dict[str, EngineSidecar]:
        """The sidecars of TensorRT's engines, by graph; of ONNX files there are none."""
        return {
            entry.name: read_sidecar(self.directory / entry.file)
            for entry in self.entries
            if entry.format == "tensorrt" and entry.file is not None
        }

    @property
    def need_host_code(self) -> bool:
        """Whether some engine is version-compatible: Triton loads these only if told to."""
        return any(sidecar.version_compatible for sidecar in self.engines.values())

    def pool_bytes(self) -> int:
        """See `pool_bytes`."""
        return pool_bytes([entry.spec for entry in self.entries], self.limits)

    def memory(self) -> GpuMemory:
        """Adds up what they take."""
        measured = {
            name: sidecar.scratch_mib
            for name, sidecar in self.engines.items()
            if sidecar.scratch_mib is not None
        }
        bound = [entry.spec for entry in self.entries if entry.name in self.engines]
        return GpuMemory(
            weights=sum(entry.size_bytes for entry in self.entries),
            scratch=round(sum(measured.values()) * 2**20),
            tensors=sum(_largest_bytes(spec) for spec in bound),
            pool=self.pool_bytes(),
            unmeasured=tuple(entry.name for entry in self.entries if entry.name not in measured),
        )

    def why_not_loadable(self, gpu: Gpu, root: Path = Path("/")) -> list[str]:
        """Returns why engines will not load on a GPU, one line for each.

        Args:
            gpu: the one that will run them.
            root: where the server's TensorRT is looked for; without one every version will do.
        """
        version = server_tensorrt(root)
        reasons = {
            name: why_not_loadable(sidecar, version, gpu.compute_capability)
            for name, sidecar in self.engines.items()
        }
        return [f"{name} {reason}" for name, reason in reasons.items() if reason is not None]


def pool_bytes(specs: Iterable[GraphSpec], limits: Limits) -> int:
    """Returns how much Triton's CUDA pool must hold: past it every tensor between two models is
    allocated and freed on its own, which waits for the whole GPU.
    """
    kept = [tensor for spec in specs if spec.name in SAM_IMAGE_GRAPHS for tensor in spec.outputs]
    image = sum(_bytes(tensor, dict.fromkeys(_axes(tensor), 1)) for tensor in kept)
    cached = limits.image_cache_mb << 20
    return cached + 2 * WORKERS * image  # as outputs of one model and inputs of the next


def check_memory(needed: GpuMemory, available: int, name: str) -> None:
    """Raises ArtifactError where the server would not fit.

    Args:
        available: bytes of the GPU.
        name: of the GPU, for the message.
    """
    if needed.total > available:
        raise ArtifactError(
            f"the server would need {needed}, and {name} has {in_units(available)}: give encoded "
            "images less (--limit image_cache_mb=N), or export with --precision fp16 or smaller "
            "ranges"
        )


def server_tensorrt(root: Path = Path("/")) -> str | None:
    """Returns the version of the libnvinfer that Triton loads; None where there is none."""
    try:
        return tensorrt_version(root)
    except LookupError:
        return None


def first_gpu() -> Gpu | None:
    """Returns the GPU of this machine that a server would use; None without one."""
    driver = read_driver()
    return driver.gpus[GPU_INDEX] if driver is not None and driver.gpus else None


def _largest_bytes(spec: GraphSpec) -> int:
    sizes = spec.sizes("max")
    return sum(_bytes(tensor, sizes) for tensor in (*spec.inputs, *spec.outputs))


def _bytes(tensor: TensorSpec, sizes: dict[str, int]) -> int:
    return math.prod(tensor.resolved(sizes)) * np.dtype(tensor.dtype).itemsize


def _axes(tensor: TensorSpec) -> list[str]:
    return [axis for axis in tensor.shape if isinstance(axis, str)]
