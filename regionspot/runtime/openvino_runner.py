"""A graph in OpenVINO, on the CPU.

With `openvino_operation` and what is built on it, the only module that imports `openvino` to run
graphs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from regionspot.errors import ArtifactError, InputError, is_interrupt
from regionspot.mapped_files import forget_pages
from regionspot.runtime.formats import OpenOptions
from regionspot.runtime.graph_spec import GraphSpec, TensorSpec
from regionspot.runtime.graphs import INPUT_SIZES
from regionspot.runtime.runner import Tensors, check_feeds, check_outputs, failed_run
from regionspot.runtime.signature import check_signature
from regionspot.threads import default_threads

try:
    import openvino

    from regionspot.runtime.openvino_attention import use_own_attention
    from regionspot.runtime.openvino_linear import use_own_linear_layers
    from regionspot.runtime.openvino_operation import NativeOperations
    from regionspot.runtime.openvino_padding import PaddingWindows, leave_out_padding
except ImportError as error:
    raise InputError(
        f"this runtime needs OpenVINO ({error}): pip install 'regionspot[openvino]'"
    ) from error

_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "u8": "uint8",
    "i32": "int32",
    "boolean": "bool",
}


_OPENING = threading.Lock()
"""Two threads that prepare graphs with our operations at the same time may wait for each other for
ever: one holds Python's lock and wants OpenVINO's, the other the reverse.
"""


class OpenVinoRunner:
    """A `Runner` over OpenVINO's IR or an ONNX file. What it keeps are arrays. Threads take turns.

    Args:
        path: the `.xml` file, its `.bin` beside it, or an `.onnx` file.
        spec: its tensors; the file must have them.
        precision: what floating-point arithmetic is done in, "f32", "bf16" or "f16". OpenVINO's own
            choice is bf16 where the CPU has it, which loses more than a graph that claims single
            precision may. int8 operations of a quantised graph stay int8.
        threads: None stands for `default_threads()`.

    Raises:
        ArtifactError: the file cannot be loaded, or is not the spec's graph.
    """

    def __init__(
        self, path: str | Path, spec: GraphSpec, precision: str = "f32", threads: int | None = None
    ) -> None:
        self.path, self.spec = Path(path), spec
        if not self.path.is_file():
            raise ArtifactError(
                f"{path} does not exist: export it, or name the directory of artefacts that holds "
                "it"
            )
        threads = threads or default_threads()
        config = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # two processes that pin their threads pin them to the same cores
            "ENABLE_CPU_PINNING": False,
        }
        try:
            with _OPENING:
                core = openvino.Core()
                model = core.read_model(path)
                ports = (
                    _tensors(model.inputs, spec.input_names),
                    _tensors(model.outputs, spec.output_names),
                )
                self._operations = NativeOperations(threads)
                if precision == "f32" and set(spec.ranges) == {"batch"}:
                    use_own_attention(model, self._operations)
                    use_own_linear_layers(model, self._operations)
                self._padding: PaddingWindows | None = None
                # a size that may change would have OpenVINO copy our operations for each run
                if self._operations.alive:
                    model.reshape(
                        {port: [1, *list(port.partial_shape)[1:]] for port in model.inputs}
                    )
                    if INPUT_SIZES.name in spec.input_names:
                        self._padding = leave_out_padding(model, self._operations)
                compiled = core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            raise ArtifactError(
                f"OpenVINO cannot load {path} ({_last_line(error)}): the file is damaged, or this "
                "version lacks an operator in its precision; export it again, or choose another "
                "precision"
            ) from error
        check_signature(spec, *ports, path)
        self._request: openvino.InferRequest | None = compiled.create_infer_request()
        self._lock = threading.Lock()
        self._running: dict[str, Any] | None = None  # inputs that OpenVINO may still read
        self._one_by_one = bool(self._operations.alive)
        forget_pages(self.path.with_suffix(".bin"))  # compiling packed the weights anew

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `Runner.infer`."""
        check_feeds(self.spec, feeds)
        batch = len(next(iter(feeds.values())))
        if not self._one_by_one or batch == 1:
            return self._infer(feeds)
        rows = [
            self._infer({name: value[row : row + 1] for name, value in feeds.items()})
            for row in range(batch)
        ]
        return {
            name: np.concatenate([row[name] for row in rows]) for name in self.spec.output_names
        }

    def _infer(self, feeds: Tensors) -> dict[str, Any]:
        with self._lock:
            if self._request is None:
                raise InputError(f"{self.path} was closed: open it again")
            self._finish_interrupted_run(self._request)
            if self._padding is not None:
                self._padding.begin(feeds[INPUT_SIZES.name][0])
            self._running = dict(feeds)
            try:
                # `infer` drops every error at one thread and leaves the outputs of the run before;
                # `wait` raises it.
                self._request.start_async(self._running, share_inputs=True)
                self._request.wait()
            except RuntimeError as error:
                if is_interrupt(error):
                    raise
                self._operations.raise_first_error()
                raise failed_run(
                    self.spec, feeds, self.path, "OpenVINO", _last_line(error)
                ) from error
            self._running = None
            outputs = {
                name: self._request.get_tensor(name).data.copy() for name in self.spec.output_names
            }
        check_outputs(self.spec, feeds, outputs, self.path, "OpenVINO")
        return outputs

    def _finish_interrupted_run(self, request: openvino.InferRequest) -> None:
        """Waits for a run that an exception, such as KeyboardInterrupt, left behind; its result is
        dropped.
        """
        if self._running is not None:
            with contextlib.suppress(RuntimeError):
                request.wait()
            self._operations.errors.clear()
            self._running = None

    def close(self) -> None:
        with self._lock:
            if self._request is not None:
                self._finish_interrupted_run(self._request)
            self._request = None
            self._operations.alive.clear()

    def __enter__(self) -> OpenVinoRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_graph(path: Path, spec: GraphSpec, options: OpenOptions) -> OpenVinoRunner:
    """Opens an IR or an ONNX file on the CPU, computing in fp32 whatever its weights are
    stored in.
    """
    return OpenVinoRunner(path, spec, threads=options.threads)


def _tensors(ports: list[Any], wanted: Collection[str]) -> list[TensorSpec]:
    """What a model says of its inputs or outputs; of a tensor's several names the one that is
    wanted.
    """
    found = []
    for port in ports:
        kind = port.element_type.get_type_name()
        shape = tuple(
            size.get_length() if size.is_static else str(size) for size in port.partial_shape
        )
        name = next((name for name in wanted if name in port.names), port.any_name)
        found.append(TensorSpec(name, _DTYPES.get(kind, kind), shape))
    return found


def _last_line(error: Exception) -> str:
    """OpenVINO's messages begin with places in its source and end with the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
