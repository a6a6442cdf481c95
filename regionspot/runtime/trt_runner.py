"""Engines of TensorRT and TensorRT-RTX on an NVIDIA GPU; memory and streams are PyTorch's."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from regionspot.errors import ArtifactError, InputError, is_interrupt
from regionspot.files import cache_root, write_atomically
from regionspot.runtime.engine_compatibility import why_not_loadable
from regionspot.runtime.engine_file import (
    EngineSidecar,
    Shape,
    check_tensors,
    flavour_named,
    read_engine,
)
from regionspot.runtime.formats import OpenOptions
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.runner import Array, Tensors, check_feeds, check_outputs
from regionspot.runtime.trt_library import create_runtime, engine_tensors, listen, load_library

MAX_SHAPES = 16
"""Sets of shapes whose buffers and graphs a runner keeps. Callers pad to few sizes, see
`regionspot.runtime.pipeline.SIZES_ON_GPU`.
"""


@dataclass(eq=False)
class _Buffer:
    """Memory of one input or output of one shape, which all sets with that shape share.

    Args:
        tensor: the memory.
        source: the kept tensor that it is a copy of, and its version; None for anything else.
    """

    tensor: Any
    source: tuple[weakref.ref[Any], int] | None = None

    def holds(self, value: Any) -> bool:
        if self.source is None:
            return False
        source, version = self.source[0](), self.source[1]
        return source is value and source._version == version

    def remember(self, value: Any) -> None:
        """Records that the buffer is a copy of `value`. Tensors that were made in inference mode
        have no version counter, so they are not remembered.
        """
        self.source = None if value.is_inference() else (weakref.ref(value), value._version)


@dataclass(eq=False)
class _Prepared:
    """What runs of one set of shapes use. NVIDIA asks for an execution context for each captured
    graph, so each set has its own.

    Args:
        context: it knows the shapes and the addresses of the buffers.
        buffers: of inputs and outputs.
        memory: scratch of the context.
        graph: captured, or None.
        runs: how many ended well.
    """

    context: Any
    buffers: dict[str, _Buffer]
    memory: Any
    graph: Any = None
    runs: int = 0


class TrtRunner:
    """One engine on one CUDA device.

    Context, buffers and CUDA graph of the last `MAX_SHAPES` sets of shapes are kept: after the
    second run of a set a graph is captured, which later runs replay. TensorRT-RTX captures by
    itself; its compiled kernels are kept in the cache folder for the next process. Kept outputs are
    CUDA tensors of PyTorch; a run whose outputs are all kept waits for nothing. Threads take turns.

    Args:
        path: the engine, its sidecar beside it (`regionspot.export.trt_engine.build_engine`).
        spec: the graph. How large inputs may be is the engine's own profile.
        runtime: "tensorrt" or "tensorrt-rtx", whichever the engine was built by.
        cuda_graphs: False runs kernel by kernel.
        device: "cuda" for PyTorch's current device, or "cuda:N".

    Raises:
        InputError: TensorRT is not installed, there is no such GPU, or the engine is of the other
            flavour.
        ArtifactError: the engine is damaged, of another version, for other GPUs, or not the spec's
            graph.
    """

    def __init__(
        self,
        path: str | Path,
        spec: GraphSpec,
        runtime: str = "tensorrt",
        cuda_graphs: bool = True,
        device: str = "cuda",
    ) -> None:
        self.path, self.spec = Path(path), spec
        plan, self.sidecar = read_engine(self.path, spec, runtime)
        self.trt = load_library(runtime)
        self.torch = _torch_with_a_gpu(
            f"running {self.path.name} with {flavour_named(runtime).title}"
        )
        self.device = _device(self.torch, device)
        self.log = listen(self.trt)
        self._captures_itself = runtime == "tensorrt-rtx"
        self._kernels: Any = None  # TensorRT-RTX's cache of compiled kernels
        with self.torch.cuda.device(self.device):
            self.runtime = create_runtime(self.trt, self.sidecar.version_compatible)
            self.engine = self.runtime.deserialize_cuda_engine(plan)
            if self.engine is None:
                raise ArtifactError(self._why_not_loaded())
            check_tensors(self.path, spec, *engine_tensors(self.trt, self.engine))
            self.stream = self.torch.cuda.Stream(self.device)
            self._config = self._context_config(cuda_graphs)
        self._may_capture = cuda_graphs and not self._captures_itself
        self._memory: Any = None
        self._prepared: OrderedDict[tuple[Shape, ...], _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `Runner.infer`. Kept tensors are the caller's: no later run changes them."""
        check_feeds(self.spec, feeds)
        shapes = self._checked_shapes(feeds)
        with self._lock:
            self._check_open()
            with self.torch.cuda.device(self.device):
                outputs = self._infer(feeds, shapes, keep)
        check_outputs(
            self.spec, feeds, outputs, self.path, flavour_named(self.sidecar.flavour).title
        )
        return outputs

    def fetch(self, kept: Sequence[Any]) -> list[Array]:
        """Copies kept tensors to the host, all in one wait. See `Runner`."""
        with self._lock, self.torch.cuda.device(self.device):
            self._check_open()
            with self._on_stream(kept, keeps=False):
                return self._to_host(kept)

    def _infer(
        self, feeds: Tensors, shapes: dict[str, Shape], keep: Collection[str]
    ) -> dict[str, Any]:
        self.log.clear()
        with self._on_stream(feeds.values(), keeps=bool(keep)) as caller:
            prepared = self._prepare(shapes)
            for name in self.spec.input_names:
                self._load(prepared.buffers[name], feeds[name])
            self._execute(prepared)
            outputs: dict[str, Any] = {
                name: prepared.buffers[name].tensor.clone()
                for name in self.spec.output_names
                if name in keep
            }
            for kept in outputs.values():
                kept.record_stream(caller)
            others = [name for name in self.spec.output_names if name not in keep]
            if others:
                arrays = self._to_host([prepared.buffers[name].tensor for name in others])
                outputs |= dict(zip(others, arrays, strict=True))
        return {name: outputs[name] for name in self.spec.output_names}

    @contextlib.contextmanager
    def _on_stream(self, given: Iterable[Any], keeps: bool) -> Iterator[Any]:
        """Runs on our stream: after the caller's earlier work if any of what is given is a kept
        tensor, and before its later work if outputs are kept, so that kept tensors go from runner
        to runner in order. A run of arrays overlaps with what other runners still do. Yields the
        caller's stream.
        """
        caller = self.torch.cuda.current_stream(self.device)
        if not all(isinstance(value, np.ndarray) for value in given):
            self.stream.wait_stream(caller)
        try:
            with self.torch.cuda.stream(self.stream):
                yield caller
        finally:
            if keeps:
                caller.wait_stream(self.stream)

    def _load(self, buffer: _Buffer, value: Any) -> None:
        """An input into its buffer. Arrays go through pinned memory, which PyTorch gives to no one
        else before the copy is done; a kept tensor that is there already is not copied again.
        """
        if isinstance(value, np.ndarray):
            buffer.source = None
            host = self.torch.empty(value.shape, dtype=buffer.tensor.dtype, pin_memory=True)
            np.copyto(host.numpy(), value)
            buffer.tensor.copy_(host, non_blocking=True)
        elif not buffer.holds(value):
            buffer.source = None
            buffer.tensor.copy_(value, non_blocking=True)
            value.record_stream(self.stream)
            buffer.remember(value)

    def _to_host(self, tensors: Sequence[Any]) -> list[Array]:
        """Arrays in pinned memory; waits for the stream once. An error of any run shows here."""
        hosts = []
        for tensor in tensors:
            host = self.torch.empty(tuple(tensor.shape), dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            hosts.append(host)
        self.stream.synchronize()
        return [host.numpy() for host in hosts]

    def _check_open(self) -> None:
        if self.engine is None:
            raise InputError(f"the runner of {self.spec.name} is closed: open it again")

    def close(self) -> None:
        with self._lock, self.torch.cuda.device(self.device):
            if self.engine is None:
                return
            self.stream.synchronize()
            self._save_kernels()
            self._prepared.clear()
            self._memory = self._kernels = self._config = self.engine = self.runtime = None

    def __enter__(self) -> TrtRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

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

    def _prepare(self, shapes: Mapping[str, Shape]) -> _Prepared:
        """The set of these shapes; a new one takes the place of the one that was used longest ago,
        if there are many.
        """
        key = tuple(shapes[name] for name in self.spec.input_names)
        prepared = self._prepared.get(key)
        if prepared is None:
            context = self._create_context()
            self._tell_shapes(context, shapes)
            prepared = _Prepared(context, self._buffers(context), self._scratch(context))
            self._tell_addresses(prepared)
            self._prepared[key] = prepared
            if len(self._prepared) > MAX_SHAPES:
                self.stream.synchronize()  # its graph may still be running
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return prepared

    def _tell_shapes(self, context: Any, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise ArtifactError(self._why_not_run(f"it takes no {name} of {shape}"))
        try:
            unknown = context.infer_shapes()
        except RuntimeError as error:
            if is_interrupt(error):
                raise
            raise ArtifactError(self._why_not_run(f"the shapes do not agree ({error})")) from error
        if unknown:
            raise ArtifactError(
                self._why_not_run(f"the shape of {', '.join(unknown)} cannot be told")
            )

    def _buffers(self, context: Any) -> dict[str, _Buffer]:
        """Of the context's shapes: what another set has of the same shape, else new memory."""
        buffers = {}
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            shape = tuple(context.get_tensor_shape(tensor.name))
            others = (one.buffers[tensor.name] for one in self._prepared.values())
            shared = next((one for one in others if tuple(one.tensor.shape) == shape), None)
            dtype = getattr(self.torch, tensor.dtype)
            buffers[tensor.name] = shared or _Buffer(
                self.torch.empty(shape, dtype=dtype, device=self.device)
            )
        return buffers

    def _scratch(self, context: Any) -> Any:
        """Memory for the context's shapes. Sets share it; one that was given smaller memory before
        keeps that.
        """
        size = context.update_device_memory_size_for_shapes()
        if size == 0 and self.log.errors:  # 0 is also what a failure gives
            raise ArtifactError(self._why_not_run("the size of its scratch memory cannot be told"))
        if self._memory is None or self._memory.numel() < size:
            self._memory = self.torch.empty(
                max(size, 1), dtype=self.torch.uint8, device=self.device
            )
        return self._memory

    def _tell_addresses(self, prepared: _Prepared) -> None:
        for name, buffer in prepared.buffers.items():
            if not prepared.context.set_tensor_address(name, buffer.tensor.data_ptr()):
                raise ArtifactError(self._why_not_run(f"it takes no memory for {name}"))
        prepared.context.set_device_memory(prepared.memory.data_ptr(), prepared.memory.numel())

    def _execute(self, prepared: _Prepared) -> None:
        """On the stream. The first two runs of a set go kernel by kernel: TensorRT wants one before
        it is captured. After the second a graph is captured, which later runs replay.
        """
        if prepared.graph is not None:
            prepared.graph.replay()
            return
        if not prepared.context.execute_async_v3(self.stream.cuda_stream):
            raise ArtifactError(self._why_not_run("the run failed"))
        prepared.runs += 1
        if self._may_capture and prepared.runs == 2:
            prepared.graph = self._capture(prepared.context)

    def _capture(self, context: Any) -> Any:
        """A CUDA graph of one run, which does not run now; None where this engine cannot be
        captured (no more tries then).

        Not by `torch.cuda.graph`, which waits for the device and gives PyTorch's cached memory
        back: nothing is allocated while TensorRT is captured.
        """
        cuda = self.torch.cuda
        graph, pool = cuda.CUDAGraph(), cuda.graph_pool_handle()
        captured = False
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            captured = context.execute_async_v3(self.stream.cuda_stream)
        except RuntimeError as error:
            if is_interrupt(error):
                raise
        finally:
            captured = self._end_capture(graph, pool) and captured
        if captured:
            return graph
        self._may_capture = False
        self.log.clear()
        return None

    def _end_capture(self, graph: Any, pool: Any) -> bool:
        """Whether the capture ended well. After one that did not, PyTorch would go on to allocate
        for it.
        """
        try:
            if self.torch.cuda.is_current_stream_capturing():
                graph.capture_end()
                return True
        except RuntimeError as error:
            if is_interrupt(error):
                raise
        for function in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(AttributeError, RuntimeError):
                getattr(self.torch._C, function)(self.device.index, pool)
        return False

    def _context_config(self, cuda_graphs: bool) -> Any:
        """What contexts are made with. Their scratch memory is ours, as large as the shapes at hand
        need and not the largest.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._captures_itself:
            return strategy
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs = self.trt.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if cuda_graphs else graphs.DISABLED
        self._kernels = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            # refuses another GPU's or version's
            self._kernels.deserialize(self._kernels_path().read_bytes())
        config.set_runtime_cache(self._kernels)
        return config

    def _create_context(self) -> Any:
        context = self.engine.create_execution_context(self._config)
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
        major, minor = self.torch.cuda.get_device_capability(self.device)
        gpu = self.torch.cuda.get_device_name(self.device)
        why = why_not_loadable(self.sidecar, self.trt.__version__, 10 * major + minor)
        found = f"{self.path} cannot be loaded on {gpu}" + (f": it {why}" if why else "")
        return (
            f"{found}. {self.log.told()} Export it again with the TensorRT and for the GPU that "
            "will run it."
        )

    def _why_not_run(self, what: str) -> str:
        gpu = self.torch.cuda.get_device_name(self.device)
        return f"{self.path} on {gpu}: {what}. {self.log.told()}".rstrip()


def open_graph(path: Path, spec: GraphSpec, options: OpenOptions) -> TrtRunner:
    """Opens an engine on "cuda", PyTorch's current device, or on "cuda:N"."""
    return TrtRunner(path, spec, options.runtime, device=options.device)


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


def _device(torch: Any, name: str) -> Any:
    """The device of a name, with its number. Raises InputError where there is none."""
    device = torch.device(name)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(
            f"there is no {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here, "
            "numbered from 0"
        )
    return torch.device("cuda", index)
