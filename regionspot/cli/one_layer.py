"""The graph `y = x + x`, which shows whether a runtime works: it is loaded, compiled and run.

It is written as ONNX by hand, since the library `onnx` may not be installed.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from regionspot.runtime.trt_library import Messages, listen, logger_of

SIZE = 4


def _field(number: int, value: int | str | bytes) -> bytes:
    """Returns a field of a protocol buffer: a number, or text or a message of up to 127 bytes."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    content = value.encode() if isinstance(value, str) else value
    return bytes([number << 3 | 2, len(content)]) + content


def _tensor(name: str) -> bytes:
    """Returns a ValueInfoProto: float32 (elem_type 1) of shape (SIZE,)."""
    shape = _field(1, _field(1, SIZE))
    kind = _field(1, _field(1, 1) + _field(2, shape))
    return _field(1, name) + _field(2, kind)


def _model() -> bytes:
    """Returns a ModelProto of IR version 8 and opset 13, which all versions that we run know."""
    node = _field(1, "x") + _field(1, "x") + _field(2, "y") + _field(4, "Add")
    tensors = _field(11, _tensor("x")) + _field(12, _tensor("y"))
    graph = _field(1, node) + _field(2, "one_layer") + tensors
    return _field(1, 8) + _field(7, graph) + _field(8, _field(2, 13))


MODEL = _model()
"""The graph as an ONNX file's content."""


def run_in_onnxruntime(runtime: Any, provider: str) -> None:
    """Runs the graph in a session in which no other provider may take it over.

    Args:
        runtime: the module `onnxruntime`.
        provider: such as "CUDAExecutionProvider".

    Raises:
        RuntimeError: it does not work, with ONNX Runtime's own reason.
    """
    options = runtime.SessionOptions()
    if provider != "CPUExecutionProvider":
        runtime.preload_dlls()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    x = np.arange(SIZE, dtype=np.float32)
    with _collect_stderr() as written:
        try:
            session = runtime.InferenceSession(MODEL, options, [provider], enable_fallback=0)
            (y,) = session.run(None, {"x": x})
        except Exception as error:  # its errors share no base class of their own
            raise RuntimeError(_reason(str(error), written())) from error
    if not np.array_equal(y, x + x):
        raise RuntimeError(f"{x} + {x} came out as {y}")


def build_in_tensorrt(trt: Any, capability: int | None = None) -> bytes:
    """Returns an engine of the graph.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx_bindings`.
        capability: compute capability of the GPU that would run it, 89 for 8.9; None for the GPU of
            this machine. TensorRT-RTX alone builds without a GPU.

    Raises:
        RuntimeError: it cannot be built, with TensorRT's own reason.
    """
    log = listen(trt)
    try:
        builder = trt.Builder(logger_of(trt))
    except (TypeError, RuntimeError) as error:  # pybind11's answer to a null pointer
        raise RuntimeError(log.told() or str(error)) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger_of(trt))
    _check(parser.parse(MODEL), log, "the ONNX parser refuses the graph")
    config = builder.create_builder_config()
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{capability}"], 0)
    plan = builder.build_serialized_network(network, config)
    _check(plan is not None, log, "no engine was built")
    return bytes(memoryview(plan))


def run_in_tensorrt(trt: Any, torch: Any, plan: bytes) -> None:
    """Runs an engine of `build_in_tensorrt` on PyTorch's current CUDA device.

    Raises:
        RuntimeError: it does not load, run, or give the right numbers.
    """
    log = listen(trt)
    engine = trt.Runtime(logger_of(trt)).deserialize_cuda_engine(plan)
    _check(engine is not None, log, "the engine does not load")
    context = engine.create_execution_context()
    _check(context is not None, log, "no execution context could be made")
    x = torch.arange(SIZE, dtype=torch.float32, device="cuda")
    y = torch.zeros_like(x)
    for name, tensor in {"x": x, "y": y}.items():
        accepted = context.set_tensor_address(name, tensor.data_ptr())
        _check(accepted, log, f"the engine takes no memory for {name}")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    _check(context.execute_async_v3(stream.cuda_stream), log, "the run failed")
    stream.synchronize()
    if y.tolist() != (x + x).tolist():
        raise RuntimeError(f"{x.tolist()} + {x.tolist()} came out as {y.tolist()}")


def _check(ok: bool, log: Messages, failure: str) -> None:
    if not ok:
        raise RuntimeError(f"{failure}. {log.told()}".rstrip())


def _reason(error: str, written: str) -> str:
    """Returns what ONNX Runtime says of a failure. A library that could not be loaded is named in
    its log alone.
    """
    missing = re.search(r"Failed to load library .*?/(lib\S+) with error: (.+)", written)
    if missing:
        return f"failed to load {missing[1]}: {missing[2].strip()}"
    return " ".join(error.split())


@contextlib.contextmanager
def _collect_stderr() -> Iterator[Callable[[], str]]:
    """Collects what native code writes to standard error. Yields a function that returns it."""
    with tempfile.TemporaryFile() as file:

        def written() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield written
        finally:
            os.dup2(saved, 2)
            os.close(saved)
