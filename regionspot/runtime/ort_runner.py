"""A graph in ONNX Runtime, on the CPU, on CUDA, or through its TensorRT provider.

The only module that imports `onnxruntime` to run graphs.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from regionspot.errors import ArtifactError, InputError, is_interrupt
from regionspot.files import cache_root
from regionspot.runtime.cuda_options import ONNX_RUNTIME_CUDA
from regionspot.runtime.engine_file import file_sha256
from regionspot.runtime.formats import FORMATS, ONNX_GPU, OpenOptions, has_nvidia_gpu
from regionspot.runtime.graph_spec import BOUNDS, GraphSpec, TensorSpec
from regionspot.runtime.runner import Tensors, check_feeds, check_outputs, failed_run
from regionspot.runtime.signature import check_signature
from regionspot.threads import default_threads

try:
    import onnxruntime as ort
except ImportError as error:
    raise InputError(
        f"this runtime needs ONNX Runtime ({error}): pip install 'regionspot[onnx]'"
    ) from error

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
EXACT_INT8 = ("session.x64quantprecision", "1")
"""Without VNNI, ONNX Runtime's default int8 kernels on x86-64 saturate sums of two products at 16
bits.
"""

_DTYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names that are not numpy's
_ERRORS_ONLY = 3


class OrtRunner:
    """A `Runner` over an ONNX file. On a GPU everything goes through I/O binding; what it keeps
    stays there.

    Single precision is that on "cpu" and "cuda". The provider "tensorrt" has no option like CUDA's
    `use_tf32` (https://github.com/microsoft/onnxruntime/issues/26029): from Ampere on it rounds the
    factors of float32 products to TF32's 10 bits, unless the environment has NVIDIA_TF32_OVERRIDE=0
    before the process makes its first session. The runtime "tensorrt" builds its engines without
    TF32.

    Args:
        path: the `.onnx` file; data beside it is found by itself.
        spec: its tensors; the file must have them.
        provider: "cpu", "cuda" or "tensorrt".
        threads: on the CPU; None stands for `default_threads()`.
        precision: of the graph. Where it holds half precision, the CPU provider can crash in its
            last optimisations, so they are left out there.
        device_id: which GPU.
        cuda_graph: capture the graph's kernels once and replay them, which saves their launches.
            Every axis of the spec must have one size, and every node must run on CUDA. Copies
            between what is kept and the graph's buffers go through the host where ONNX Runtime's
            `OrtValue.update_inplace` takes arrays alone, as in 1.22.

    Raises:
        InputError: ONNX Runtime lacks the provider, or it does not start here, or cannot capture
            these shapes.
        ArtifactError: the file cannot be loaded, or is not the spec's graph.
    """

    def __init__(
        self,
        path: str | Path,
        spec: GraphSpec,
        provider: str = "cpu",
        threads: int | None = None,
        precision: str = "fp32",
        device_id: int = 0,
        cuda_graph: bool = False,
    ) -> None:
        self.path, self.spec = Path(path), spec
        if not self.path.is_file():
            raise ArtifactError(
                f"{path} does not exist: export it, or name the directory of artefacts that holds "
                "it"
            )
        if cuda_graph:
            _check_fixed(spec, provider)
        self._device = ("cpu", 0) if provider == "cpu" else ("cuda", device_id)
        self.cuts_kept = provider == "cpu"  # an OrtValue is whole
        self._session: ort.InferenceSession | None = open_session(
            self.path, spec, provider, threads, precision, device_id, cuda_graph
        )
        check_signature(
            spec, _tensors(self._session.get_inputs()), _tensors(self._session.get_outputs()), path
        )
        self._fixed = FixedBuffers(self._session, spec, self._device) if cuda_graph else None

    @property
    def waits_for_gpu(self) -> bool:
        """See `Runner`."""
        return self._device[0] != "cpu"

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `Runner.infer`. What is kept on a GPU is an `OrtValue`."""
        session, fixed = self._session, self._fixed
        if session is None:
            raise InputError(f"{self.path} was closed: open it again")
        check_feeds(self.spec, feeds)
        kept = () if self._device[0] == "cpu" else keep
        try:
            outputs = fixed.infer(feeds, kept) if fixed else self._infer(session, feeds, kept)
        except Exception as error:  # its errors share no base class of their own
            if isinstance(error, MemoryError) or is_interrupt(error):
                raise
            raise failed_run(
                self.spec, feeds, self.path, "ONNX Runtime", " ".join(str(error).split())
            ) from error
        check_outputs(self.spec, feeds, outputs, self.path, "ONNX Runtime")
        return outputs

    def _infer(
        self, session: ort.InferenceSession, feeds: Tensors, kept: Collection[str]
    ) -> dict[str, Any]:
        binding = session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self.spec.output_names:
            binding.bind_output(name, *(self._device if name in kept else ("cpu", 0)))
        session.run_with_iobinding(binding)
        named = zip(self.spec.output_names, binding.get_outputs(), strict=True)
        return {name: value if name in kept else value.numpy() for name, value in named}

    def close(self) -> None:
        self._session = self._fixed = None

    def __enter__(self) -> OrtRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class FixedBuffers:
    """Inputs and outputs that stay where they are in memory, as a captured CUDA graph needs them.
    Threads take turns.

    Args:
        session: of a graph whose axes have one size each.
        device: where the buffers are, such as ("cuda", 0).
    """

    def __init__(
        self, session: ort.InferenceSession, spec: GraphSpec, device: tuple[str, int]
    ) -> None:
        self._session, self._spec, self._device = session, spec, device
        self._lock = threading.Lock()
        self._inputs = {tensor.name: self._buffer(tensor) for tensor in spec.inputs}
        self._outputs = {tensor.name: self._buffer(tensor) for tensor in spec.outputs}
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def infer(self, feeds: Tensors, keep: Collection[str]) -> dict[str, Any]:
        """Copy the feeds in, run, copy the outputs out: those to keep to new memory on the
        device.
        """
        results: dict[str, Any] = {}
        with self._lock:
            for name, value in feeds.items():
                _copy(value, self._inputs[name])
            self._session.run_with_iobinding(self._binding)
            for tensor in self._spec.outputs:
                output = self._outputs[tensor.name]
                if tensor.name in keep:
                    results[tensor.name] = self._buffer(tensor)
                    _copy(output, results[tensor.name])
                else:
                    results[tensor.name] = np.array(output.numpy())
        return results

    def _buffer(self, tensor: TensorSpec) -> ort.OrtValue:
        shape = tensor.resolved(self._spec.sizes("max"))
        return ort.OrtValue.ortvalue_from_shape_and_type(
            shape, np.dtype(tensor.dtype), *self._device
        )


def _copy(source: Any, target: ort.OrtValue) -> None:
    """An array or an OrtValue into an OrtValue that stays where it is."""
    try:
        target.update_inplace(source)
    except TypeError:  # an older ONNX Runtime, which takes arrays alone
        target.update_inplace(source.numpy())


def open_graph(path: Path, spec: GraphSpec, options: OpenOptions) -> OrtRunner:
    """Opens an ONNX file; "cuda:1" is the provider "cuda" on the GPU 1."""
    provider, _, index = options.device.partition(":")
    return OrtRunner(
        path,
        spec,
        provider,
        options.threads,
        options.precision,
        int(index or 0),
        options.cuda_graph,
    )


def open_session(
    path: Path,
    spec: GraphSpec,
    provider: str = "cpu",
    threads: int | None = None,
    precision: str = "fp32",
    device_id: int = 0,
    cuda_graph: bool = False,
) -> ort.InferenceSession:
    """Opens an ONNX file as `OrtRunner` does, whose arguments and errors these are; its outputs
    need not be the spec's.
    """
    providers = _providers(path, spec, provider, device_id, cuda_graph)
    # in int8 for a GPU, all but the linear layers
    for_gpu = path.name.endswith(FORMATS[ONNX_GPU].suffix)
    half = precision in ("fp16", "bf16", "fp8") or (precision == "int8" and for_gpu)
    return _open(path, _session_options(provider, threads, half), providers)


def best_device() -> str:
    """ "cuda" where this ONNX Runtime can use an NVIDIA GPU and there is one, else "cpu"."""
    return (
        "cuda" if has_nvidia_gpu() and PROVIDERS["cuda"] in ort.get_available_providers() else "cpu"
    )


def profile_options(spec: GraphSpec) -> dict[str, str]:
    """The ranges of a graph's dynamic inputs, as the TensorRT provider's options say them."""
    dynamic = [
        tensor for tensor in spec.inputs if any(isinstance(axis, str) for axis in tensor.shape)
    ]
    options = {}
    for bound in BOUNDS:
        sizes = spec.sizes(bound)
        shapes = (
            f"{tensor.name}:{'x'.join(map(str, tensor.resolved(sizes)))}" for tensor in dynamic
        )
        options[f"trt_profile_{bound}_shapes"] = ",".join(shapes)
    return options


def engine_cache(path: Path) -> Path:
    """Where the TensorRT provider keeps the engines of one ONNX file.

    It names them after the graph's structure: two heads would share an engine, and with it the
    weights of the first. So each content of the file and of the data beside it (`NAME.onnx.data`)
    has a folder of its own.
    """
    digest = hashlib.sha256()
    for part in sorted(path.parent.iterdir()):
        if part.name.startswith(path.name) and part.is_file():
            digest.update(f"{part.name.removeprefix(path.name)} {file_sha256(part)}\n".encode())
    return cache_root() / "onnxruntime-tensorrt" / digest.hexdigest()


def _check_fixed(spec: GraphSpec, provider: str) -> None:
    dynamic = [
        f"{axis} {allowed}" for axis, allowed in spec.ranges.items() if allowed.min != allowed.max
    ]
    if provider != "cuda" or dynamic:
        raise InputError(
            f"{spec.name} cannot be captured as a CUDA graph: "
            + (
                f"its shapes are dynamic ({', '.join(dynamic)}); export it with one size of each"
                if dynamic
                else ""
            )
            + (f"the provider is {provider}, not cuda" if not dynamic else "")
        )


def _session_options(provider: str, threads: int | None, half: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # several graphs share the cores, in turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(*EXACT_INT8)
    if provider == "cpu" and half:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


def _providers(
    path: Path, spec: GraphSpec, provider: str, device_id: int, cuda_graph: bool
) -> list[tuple[str, dict[str, str]]]:
    """The provider asked for and what it falls back on for single nodes, with their options."""
    if provider not in PROVIDERS:
        raise InputError(f"there is no provider {provider!r}: choose one of {', '.join(PROVIDERS)}")
    there = ort.get_available_providers()
    if PROVIDERS[provider] not in there:
        raise InputError(
            f"this ONNX Runtime has no {PROVIDERS[provider]} (it has {', '.join(there)}): "
            "pip uninstall onnxruntime, then pip install 'regionspot[onnx-gpu]', or work on the CPU"
        )
    if provider != "cpu":
        ort.preload_dlls()
    cuda = {
        "device_id": str(device_id),
        **ONNX_RUNTIME_CUDA,
        "enable_cuda_graph": "1" if cuda_graph else "0",
    }
    tensorrt = _tensorrt_options(path, spec, device_id) if provider == "tensorrt" else {}
    chain = {"cpu": ["cpu"], "cuda": ["cuda", "cpu"], "tensorrt": ["tensorrt", "cuda", "cpu"]}[
        provider
    ]
    options = {"cpu": {}, "cuda": cuda, "tensorrt": tensorrt}
    return [(PROVIDERS[name], options[name]) for name in chain]


def _tensorrt_options(path: Path, spec: GraphSpec, device_id: int) -> dict[str, str]:
    """Without a cache where its folder cannot be made; the provider makes no folders above it."""
    options = {"device_id": str(device_id), **profile_options(spec)}
    engines = engine_cache(path)
    with contextlib.suppress(OSError):
        engines.mkdir(parents=True, exist_ok=True)
        options |= {
            "trt_engine_cache_enable": "True",  # the provider rejects 1
            "trt_engine_cache_path": str(engines),
            "trt_timing_cache_enable": "True",
            # of kernels' speeds, which no weights change
            "trt_timing_cache_path": str(engines.parent),
        }
    return options


def _open(
    path: Path, options: ort.SessionOptions, providers: list[tuple[str, dict[str, str]]]
) -> ort.InferenceSession:
    try:
        # By default a provider that cannot start is left out, and why goes to standard output.
        session = ort.InferenceSession(path, options, providers, enable_fallback=0)
    except Exception as error:  # its errors share no base class of their own
        reason = " ".join(str(error).split())
        # what is wrong with a file is an error of its own kinds
        if providers[0][0] != PROVIDERS["cpu"] and isinstance(error, (RuntimeError, ValueError)):
            raise InputError(
                f"ONNX Runtime could not start {providers[0][0]} here: {reason}. Mend that, or "
                "work on the CPU"
            ) from error
        raise ArtifactError(
            f"ONNX Runtime cannot load {path} ({reason}): the file is damaged, or this version "
            "lacks an operator in its precision; export it again, or choose another precision"
        ) from error
    if session.get_providers()[0] != providers[0][0]:
        raise InputError(
            f"ONNX Runtime could not start {providers[0][0]} here and fell back to "
            f"{session.get_providers()[0]}, for a reason that it prints above (mostly CUDA, cuDNN "
            "or TensorRT libraries that are missing or of another version): mend that, or work on "
            "the CPU"
        )
    return session


def _tensors(nodes: list[Any]) -> list[TensorSpec]:
    """What a session says of its inputs or outputs."""
    found = []
    for node in nodes:
        kind = node.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(size if isinstance(size, int) else str(size) for size in node.shape)
        found.append(TensorSpec(node.name, _DTYPES.get(kind, kind), shape))
    return found
