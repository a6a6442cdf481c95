"""Stand-ins for CUDA and TensorRT: what `TrtRunner` asks of them is counted, and engines are
computed by PyTorch on the CPU.

Memory is real and addresses are real: a replayed graph reads and writes the addresses that it was
captured with, so a buffer that moved shows as a wrong result. As TensorRT asks, a context must be
told how much scratch memory its shapes need, and run once, before it is captured.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from regionspot.runtime import torch_runner, trt_library, trt_runner
from regionspot.runtime.engine_file import (
    DYNAMIC,
    EngineSidecar,
    EngineTensor,
    profile_of,
    write_engine,
)
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.trt_library import NUMPY_NAMES

VERSION = "11.4.0.106"
Compute = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""What an engine computes: inputs by name to outputs by name."""


class _OnGpu(torch.Tensor):
    """In the CPU's memory, as is all that is computed of it; says that it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


class FakeCuda:
    """Stands in for PyTorch's CUDA and for the module tensorrt while `installed`.

    Attributes:
        counts: "allocation" on the device, "shapes" told to a context, "capture", "replay", "run"
            kernel by kernel, "synchronize" of the host with a stream, "wait" of a stream for
            another, and "copy" of a kept tensor into a buffer.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.engines: dict[bytes, tuple[GraphSpec, Compute]] = {}
        self.with_code: set[bytes] = set()  # version-compatible engines
        self.tensors: dict[int, torch.Tensor] = {}  # by address
        self.capturing: list[Callable[[], None]] | None = None
        self.capturable = True
        self.pools = self.released = 0  # of memory, that captures allocate in

    def write(
        self, folder: Path, spec: GraphSpec, compute: Compute, version_compatible: bool = False
    ) -> Path:
        """An engine file that computes so."""
        plan = f"engine {spec.name} {len(self.engines)}".encode()
        self.engines[plan] = spec, compute
        if version_compatible:
            self.with_code.add(plan)
        profiles = profile_of(spec)

        def tensor(one: Any, profile: Any = None) -> EngineTensor:
            shape = tuple(DYNAMIC if isinstance(axis, str) else axis for axis in one.shape)
            return EngineTensor(one.name, one.dtype, shape, profile)

        sidecar = EngineSidecar(
            graph=spec.name,
            flavour="tensorrt",
            file=f"{spec.name}.plan",
            size_bytes=len(plan),
            sha256=hashlib.sha256(plan).hexdigest(),
            versions={"tensorrt": VERSION},
            compute_capabilities=(),
            device="a fake",
            optimization_level=3,
            workspace_mib=None,
            build_s=0.0,
            inputs=tuple(tensor(one, profiles[one.name]) for one in spec.inputs),
            outputs=tuple(tensor(one) for one in spec.outputs),
            onnx={},
            version_compatible=version_compatible,
        )
        path = folder / f"{spec.name}.plan"
        write_engine(path, plan, sidecar)
        return path

    @contextlib.contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, "tensorrt", self._tensorrt())
            patch.setattr(trt_library, "_loggers", {})
            patch.setattr(trt_runner, "_torch_with_a_gpu", lambda what: self._torch())
            patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
            yield self

    @contextlib.contextmanager
    def installed_for_torch(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
        """For `TorchRunner`: what is brought to the device stays on the CPU and says otherwise."""
        fake = self

        class Torch:
            cuda = self._cuda()

            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

            def empty(self, *shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
                assert pin_memory
                fake.counts["pinned"] += 1
                return torch.empty(*shape, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch_runner, "torch", Torch())
            patch.setattr(
                torch_runner,
                "on_device",
                lambda value, device: torch_runner.as_tensor(value).as_subclass(_OnGpu),
            )
            patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
            yield self

    def _torch(self) -> Any:
        names = ("Tensor", "uint8", "int32", "float32", "bool")
        return SimpleNamespace(
            **{name: getattr(torch, name) for name in names},
            cuda=self._cuda(),
            device=lambda *_: torch.device("cpu"),
            empty=self._empty,
            _C=SimpleNamespace(
                _cuda_endAllocateToPool=lambda device, pool: None,
                _cuda_releasePool=self._release_pool,
            ),
        )

    def _new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def _release_pool(self, device: int | None, pool: int) -> None:
        assert pool == self.pools
        self.released += 1

    def _empty(
        self, shape: Any, dtype: torch.dtype, device: Any = None, pin_memory: bool = False
    ) -> torch.Tensor:
        if not pin_memory:
            self.counts["allocation"] += 1
        tensor = torch.full((shape,) if isinstance(shape, int) else tuple(shape), 77, dtype=dtype)
        self.tensors[tensor.data_ptr()] = tensor
        return tensor

    def _cuda(self) -> Any:
        fake = self

        class Stream:
            cuda_stream = 1

            def __init__(self, *_: Any) -> None:
                pass

            def wait_stream(self, other: Any) -> None:
                fake.counts["wait"] += 1

            def synchronize(self) -> None:
                fake.counts["synchronize"] += 1

        class CUDAGraph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert pool == fake.pools == fake.released + 1, "memory of a failed capture is kept"
                fake.counts["capture"] += 1
                self.work: list[Callable[[], None]] = []
                fake.capturing = self.work

            def capture_end(self) -> None:
                fake.capturing = None
                if fake.capturable:
                    fake.released += 1
                else:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                fake.counts["replay"] += 1
                for one in self.work:
                    one()

        return SimpleNamespace(
            Stream=Stream,
            CUDAGraph=CUDAGraph,
            graph_pool_handle=self._new_pool,
            is_current_stream_capturing=lambda: self.capturing is not None,
            current_stream=lambda device: Stream(),
            current_device=lambda: 0,
            device_count=lambda: 1,
            device=lambda device: contextlib.nullcontext(),
            stream=lambda stream: contextlib.nullcontext(),
            get_device_name=lambda device=None: "a fake",
            get_device_capability=lambda device=None: (8, 9),
        )

    def _tensorrt(self) -> ModuleType:
        fake = self
        modes = SimpleNamespace(INPUT="input", OUTPUT="output")
        kinds = {numpy: SimpleNamespace(name=trt) for trt, numpy in NUMPY_NAMES.items()}

        class ILogger:
            WARNING, ERROR, INTERNAL_ERROR = "warning", "error", "internal error"

        class Engine:
            def __init__(self, plan: bytes) -> None:
                self.spec, self.compute = fake.engines[plan]
                self.tensors = (*self.spec.inputs, *self.spec.outputs)
                self.num_io_tensors = len(self.tensors)

            def get_tensor_name(self, index: int) -> str:
                return self.tensors[index].name

            def _of(self, name: str) -> Any:
                return next(one for one in self.tensors if one.name == name)

            def get_tensor_dtype(self, name: str) -> Any:
                return kinds[self._of(name).dtype]

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                return tuple(
                    DYNAMIC if isinstance(axis, str) else axis for axis in self._of(name).shape
                )

            def get_tensor_mode(self, name: str) -> str:
                return modes.INPUT if name in self.spec.input_names else modes.OUTPUT

            def get_tensor_profile_shape(self, name: str, index: int) -> Any:
                return profile_of(self.spec)[name]

            def create_execution_context(self, strategy: Any) -> Context:
                return Context(self)

        class Context:
            def __init__(self, engine: Engine) -> None:
                self.engine = engine
                self.shapes: dict[str, tuple[int, ...]] = {}
                self.addresses: dict[str, int] = {}
                self.is_sized = self.has_run = False

            def set_input_shape(self, name: str, shape: Any) -> bool:
                self.shapes[name] = tuple(shape)
                self.is_sized = self.has_run = False
                return True

            def infer_shapes(self) -> list[str]:
                fake.counts["shapes"] += 1
                return []

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                spec = self.engine.spec
                sizes = {
                    axis: size
                    for tensor in spec.inputs
                    for axis, size in zip(tensor.shape, self.shapes[tensor.name], strict=True)
                    if isinstance(axis, str)
                }
                return self.engine._of(name).resolved(sizes)

            def set_tensor_address(self, name: str, address: int) -> bool:
                self.addresses[name] = address
                return True

            def update_device_memory_size_for_shapes(self) -> int:
                self.is_sized = True
                return 1024 * max(map(max, self.shapes.values()))

            def set_device_memory(self, address: int, size: int) -> None:
                assert fake.tensors[address].numel() == size
                self.memory = size

            def execute_async_v3(self, stream: int) -> bool:
                addresses, spec = dict(self.addresses), self.engine.spec
                assert self.is_sized and self.memory >= self.update_device_memory_size_for_shapes()

                def work() -> None:
                    inputs = {name: fake.tensors[addresses[name]] for name in spec.input_names}
                    for name, value in self.engine.compute(inputs).items():
                        fake.tensors[addresses[name]].copy_(value)

                if fake.capturing is None:
                    fake.counts["run"] += 1
                    self.has_run = True
                    work()
                else:
                    assert self.has_run, "shapes are new to it: TensorRT cannot capture"
                    fake.capturing.append(work)
                    return fake.capturable
                return True

        class Runtime:
            engine_host_code_allowed = False

            def __init__(self, logger: Any) -> None:
                pass

            def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
                refused = plan in fake.with_code and not self.engine_host_code_allowed
                return None if refused or plan not in fake.engines else Engine(plan)

        module = ModuleType("tensorrt")
        module.__dict__.update(
            __version__=VERSION,
            ILogger=ILogger,
            TensorIOMode=modes,
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
            Runtime=Runtime,
        )
        return module
