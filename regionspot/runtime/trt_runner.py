"""Engines of TensorRT and TensorRT-RTX on an NVIDIA GPU; memory and streams are PyTorch's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from regionspot.errors import ArtifactError, InputError, is_interrupt
from regionspot.files import cache_root, write_atomically
from regionspot.runtime.engine_file import (
    EngineSidecar,
    Shape,
    check_tensors,
    flavour_named,
    read_engine,
)
from regionspot.runtime.formats import OpenOptions
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.runner import Tensors, check_feeds, check_outputs
from regionspot.runtime.trt_library import engine_tensors, in_words, listen, load_library, logger_of


class TrtRunner:
    """One engine, on the current CUDA device.

    Inputs are copied into buffers that stay where they are while the shapes stay the same: a second
    run of the same shapes is captured as a CUDA graph and later ones replay it. TensorRT-RTX
    captures by itself; its compiled kernels are kept in the cache folder for the next process. Kept
    outputs are CUDA tensors of PyTorch. Threads take turns.

    Args:
        path: the engine, its sidecar beside it (`regionspot.export.trt_engine.build_engine`).
        spec: the graph. How large inputs may be is the engine's own profile.
        runtime: "tensorrt" or "tensorrt-rtx", whichever the engine was built by.
        cuda_graphs: False runs kernel by kernel.

    Raises:
        InputError: TensorRT is not installed, there is no GPU, or the engine is of the other
            flavour.
        ArtifactError: the engine is damaged, of another version, for other GPUs, or not the spec's
            graph.
    """

    def __init__(
        self, path: str | Path, spec: GraphSpec, runtime: str = "tensorrt", cuda_graphs: bool = True
    ) -> None:
        self.path, self.spec = Path(path), spec
        plan, self.sidecar = read_engine(self.path, spec, runtime)
        self.trt = load_library(runtime)
        self.torch = _torch_with_a_gpu(
            f"running {self.path.name} with {flavour_named(runtime).title}"
        )
        self.device = self.torch.device("cuda", self.torch.cuda.current_device())
        self.log = listen(self.trt)
        self.runtime = self.trt.Runtime(logger_of(self.trt))
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise ArtifactError(self._why_not_loaded())
        check_tensors(self.path, spec, *engine_tensors(self.trt, self.engine))
        self.stream = self.torch.cuda.Stream(self.device)
        self._captures_itself = runtime == "tensorrt-rtx"
        self._kernels: Any = None  # TensorRT-RTX's cache of compiled kernels
        self.context = self._create_context(cuda_graphs)
        self._may_capture = cuda_graphs and not self._captures_itself
        self._memory: Any = None
        self._graph: Any = None
        self._buffers: dict[str, Any] = {}
        self._shapes: dict[str, Shape] = {}
        self._runs = 0  # of these shapes
        self._lock = threading.Lock()

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `Runner.infer`. Kept tensors are the caller's: no later run changes them."""
        check_feeds(self.spec, feeds)
        shapes = self._checked_shapes(feeds)
        with self._lock:
            if self.context is None:
                raise InputError(f"the runner of {self.spec.name} is closed: open it again")
            outputs = self._infer(feeds, shapes, keep)
        check_outputs(
            self.spec, feeds, outputs, self.path, flavour_named(self.sidecar.flavour).title
        )
        return outputs

    def _infer(
        self, feeds: Tensors, shapes: dict[str, Shape], keep: Collection[str]
    ) -> dict[str, Any]:
        self.log.clear()
        caller = self.torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)  # kept tensors of another runner may still be on their way
        with self.torch.cuda.stream(self.stream):
            if shapes != self._shapes:
                self._prepare(shapes)
            for name in self.spec.input_names:
                self._buffers[name].copy_(self._as_tensor(feeds[name]), non_blocking=True)
            self._execute()
            outputs = {
                name: self._buffers[name].clone()
                if name in keep
                else self._buffers[name].cpu().numpy()
                for name in self.spec.output_names
            }
        for kept in (value for value in outputs.values() if isinstance(value, self.torch.Tensor)):
            kept.record_stream(caller)
        # the arrays behind the inputs are the caller's again, and an error shows here
        self.stream.synchronize()
        return outputs

    def close(self) -> None:
        with self._lock:
            if self.context is None:
                return
            self.stream.synchronize()
            self._save_kernels()
            self._graph = self._memory = self._kernels = None
            self._buffers = {}
            self.context = self.engine = self.runtime = None

    def __enter__(self) -> TrtRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _as_tensor(self, value: Any) -> Any:
        """PyTorch's view of an array; one that is read-only or not contiguous is copied."""
        if isinstance(value, np.ndarray):
            return self.torch.from_numpy(np.require(value, requirements=["C", "W"]))
        return value

    def _checked_shapes(self, feeds: Tensors) -> dict[str, Shape]:
        """Raises InputError for a shape out of the engine's profile, or a kept tensor that does not
        fit.
        """
        shapes = {}
        for tensor in self.spec.inputs:
            value = feeds[tensor.name]
            if not isinstance(value, np.ndarray):
                if not isinstance(value, self.torch.Tensor) or value.device != self.device:
                    raise InputError(
                        f"{self.spec.name}: {tensor.name} must be a numpy array, or what another "
                        f"TensorRT runner kept on {self.device}, not "
                        f"{getattr(value, 'device', type(value).__name__)}"
                    )
                if value.dtype != getattr(self.torch, tensor.dtype):
                    raise InputError(
                        f"{self.spec.name}: {tensor.name} must be {tensor.dtype}, not {value.dtype}"
                    )
            shapes[tensor.name] = tuple(value.shape)
        check_profile(self.spec, self.sidecar, shapes)
        return shapes

    def _prepare(self, shapes: Mapping[str, Shape]) -> None:
        """Buffers, addresses and scratch memory for these shapes; a graph captured for others is
        void.
        """
        self._graph, self._buffers, self._shapes, self._runs = None, {}, {}, 0
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise ArtifactError(self._why_not_run(f"it takes no {name} of {shape}"))
        try:
            unknown = self.context.infer_shapes()
        except RuntimeError as error:
            if is_interrupt(error):
                raise
            raise ArtifactError(self._why_not_run(f"the shapes do not agree ({error})")) from error
        if unknown:
            raise ArtifactError(
                self._why_not_run(f"the shape of {', '.join(unknown)} cannot be told")
            )
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            shape = tuple(self.context.get_tensor_shape(tensor.name))
            dtype = getattr(self.torch, tensor.dtype)
            buffer = self.torch.empty(shape, dtype=dtype, device=self.device)
            self.context.set_tensor_address(tensor.name, buffer.data_ptr())
            self._buffers[tensor.name] = buffer
        size = self.context.update_device_memory_size_for_shapes()
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # first back to PyTorch
            self._memory = self.torch.empty(
                max(size, 1), dtype=self.torch.uint8, device=self.device
            )
        self.context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        self._shapes = dict(shapes)

    def _execute(self) -> None:
        """On the stream: the first run of a shape kernel by kernel, the second is captured, then
        replayed.
        """
        self._runs += 1
        if self._may_capture and self._runs == 2:
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.replay()
        elif not self.context.execute_async_v3(self.stream.cuda_stream):
            raise ArtifactError(self._why_not_run("the run failed"))

    def _capture(self) -> Any:
        """A CUDA graph of one run, or None where this engine cannot be captured (no more tries
        then).
        """
        graph = self.torch.cuda.CUDAGraph()
        try:
            with self.torch.cuda.graph(
                graph, stream=self.stream, capture_error_mode="thread_local"
            ):
                if not self.context.execute_async_v3(self.stream.cuda_stream):
                    raise RuntimeError("not capturable")
        except RuntimeError as error:
            if is_interrupt(error):
                raise
            self._may_capture = False
            return None
        return graph

    def _create_context(self, cuda_graphs: bool) -> Any:
        """A context whose scratch memory is ours, as large as the shapes at hand need and not the
        largest.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._captures_itself:
            context = self.engine.create_execution_context(strategy)
        else:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            graphs = self.trt.CudaGraphStrategy
            config.cuda_graph_strategy = (
                graphs.WHOLE_GRAPH_CAPTURE if cuda_graphs else graphs.DISABLED
            )
            self._kernels = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                # refuses another GPU's or version's
                self._kernels.deserialize(self._kernels_path().read_bytes())
            config.set_runtime_cache(self._kernels)
            context = self.engine.create_execution_context(config)
        if context is None:
            raise ArtifactError(self._why_not_run("no execution context could be made"))
        return context

    def _kernels_path(self) -> Path:
        major, minor = self.torch.cuda.get_device_capability(self.device)
        return (
            cache_root() / "tensorrt-rtx" / f"{self.sidecar.sha256[:16]}-sm{major}{minor}.kernels"
        )

    def _save_kernels(self) -> None:
        """The next process need not compile them again; a cache that cannot be written is no
        error.
        """
        if self._kernels is None:
            return
        content = bytes(memoryview(self._kernels.serialize()))
        path = self._kernels_path()
        with contextlib.suppress(OSError, ArtifactError):
            if not path.exists() or path.read_bytes() != content:
                write_atomically(path, content)

    def _why_not_loaded(self) -> str:
        name = self.trt.__name__
        reasons = [
            f"it was built by {name} {self.sidecar.versions.get(name)}, this is "
            f"{self.trt.__version__}"
        ]
        if self.sidecar.compute_capabilities:
            reasons.append(
                f"for GPUs of compute capability {in_words(self.sidecar.compute_capabilities)}"
            )
        if self.sidecar.device:
            reasons.append(f"on {self.sidecar.device}")
        major, minor = self.torch.cuda.get_device_capability(self.device)
        gpu = self.torch.cuda.get_device_name(self.device)
        return (
            f"{self.path} cannot be loaded on {gpu} (compute capability {major}.{minor}): "
            f"{', '.join(reasons)}. {self.log.told()} Export it again with the TensorRT and for "
            "the GPU that will run it."
        )

    def _why_not_run(self, what: str) -> str:
        gpu = self.torch.cuda.get_device_name(self.device)
        return f"{self.path} on {gpu}: {what}. {self.log.told()}".rstrip()


def open_graph(path: Path, spec: GraphSpec, options: OpenOptions) -> TrtRunner:
    """Opens an engine on the current CUDA device."""
    return TrtRunner(path, spec, options.runtime)


def check_profile(spec: GraphSpec, sidecar: EngineSidecar, shapes: Mapping[str, Shape]) -> None:
    """Raises InputError unless every input's shape is in the engine's profile and axes of one name
    are as long.
    """
    for tensor in sidecar.inputs:
        shape = shapes[tensor.name]
        smallest, _, largest = tensor.profile or (tensor.shape,) * 3
        if len(shape) != len(smallest) or any(
            not low <= size <= high
            for low, size, high in zip(smallest, shape, largest, strict=True)
        ):
            raise InputError(
                f"{spec.name}: {tensor.name} of shape {shape} is out of the engine's range, "
                f"{smallest} to {largest}: send less at a time, or export with wider ranges"
            )
    sizes: dict[str, int] = {}
    for wanted in spec.inputs:
        for axis, size in zip(wanted.shape, shapes[wanted.name], strict=True):
            if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                raise InputError(
                    f"{spec.name}: {axis} is {size} in {wanted.name}, but {sizes[axis]} in the "
                    "inputs before it"
                )


def _torch_with_a_gpu(what: str) -> Any:
    """PyTorch, or InputError where it sees no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        why = (
            "PyTorch is a build without CUDA"
            if torch.version.cuda is None
            else "PyTorch sees no CUDA device"
        )
        raise InputError(
            f"{what} needs an NVIDIA GPU: {why}. Run the onnxruntime or openvino artefacts here, "
            "or this one on a machine with a GPU and PyTorch for CUDA."
        )
    return torch
