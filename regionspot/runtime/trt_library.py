"""The TensorRT and TensorRT-RTX libraries: loading, their log, and names of data types and
devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from regionspot.errors import InputError
from regionspot.runtime.engine_file import EngineTensor, flavour_named

OLDEST_TENSORRT = (10, 9)

NUMPY_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
"""TensorRT's data types in numpy's words."""

MAX_TOLD = 1000
"""Letters of TensorRT's errors that are passed on."""


def load_library(flavour: str) -> Any:
    """The TensorRT module of a flavour.

    Raises:
        InputError: it is not installed, or too old.
    """
    wanted = flavour_named(flavour)
    try:
        if flavour == "tensorrt":
            import tensorrt as trt
        else:
            import tensorrt_rtx_bindings as trt
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # a stub without its libraries raises any of them
        raise InputError(
            f"{wanted.title} cannot be imported ({str(error).splitlines()[0]}): {wanted.install}"
        ) from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if flavour == "tensorrt" and version < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        raise InputError(
            f"TensorRT {trt.__version__} is too old, {oldest} or later is needed: {wanted.install}"
        )
    return trt


@dataclass(eq=False)
class Messages:
    """What TensorRT said, each message on one line.

    Args:
        wanted: tells which lines besides errors and warnings are kept, as `details`; None keeps
            none.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    wanted: Callable[[str], bool] | None = None
    details: list[str] = field(default_factory=list)

    def told(self) -> str:
        """The errors as a sentence, or nothing."""
        return (
            f"TensorRT says: {'; '.join(dict.fromkeys(self.errors))[:MAX_TOLD]}."
            if self.errors
            else ""
        )

    def clear(self) -> None:
        self.errors.clear()
        self.warnings.clear()


_loggers: dict[str, Any] = {}


def logger_of(trt: Any) -> Any:
    """The `ILogger` of this process, which prints nothing and passes on what it is told to those
    who `listen`.

    There is one: while any builder or runtime lives, TensorRT sends everything to the logger of the
    first.
    """
    if trt.__name__ not in _loggers:

        class Log(trt.ILogger):
            def __init__(self) -> None:
                super().__init__()
                self.listeners: WeakSet[Messages] = WeakSet()

            def log(self, severity: Any, message: str) -> None:
                for listener in tuple(self.listeners):
                    if severity == trt.ILogger.WARNING:
                        listener.warnings.append(" ".join(message.split()))
                    elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                        listener.errors.append(" ".join(message.split()))
                    elif listener.wanted is not None:
                        listener.details += filter(listener.wanted, message.splitlines())

        _loggers[trt.__name__] = Log()
    return _loggers[trt.__name__]


def listen(trt: Any, wanted: Callable[[str], bool] | None = None) -> Messages:
    """What TensorRT says from now on, as long as the caller keeps it; see `Messages`."""
    messages = Messages(wanted=wanted)
    logger_of(trt).listeners.add(messages)
    return messages


def create_runtime(trt: Any, version_compatible: bool = False) -> Any:
    """Returns what loads engines.

    Args:
        version_compatible: whether they may bring the code that runs them, as version-compatible
            engines do: who made them is trusted like a program.
    """
    runtime = trt.Runtime(logger_of(trt))
    if version_compatible:
        runtime.engine_host_code_allowed = True
    return runtime


def engine_tensors(trt: Any, engine: Any) -> tuple[list[EngineTensor], list[EngineTensor]]:
    """Inputs and outputs of a deserialised engine, the inputs with its first profile."""
    inputs, outputs = [], []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = NUMPY_NAMES.get(engine.get_tensor_dtype(name).name, "?")
        shape = tuple(engine.get_tensor_shape(name))
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            smallest, best, largest = (
                tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0)
            )
            inputs.append(EngineTensor(name, dtype, shape, (smallest, best, largest)))
        else:
            outputs.append(EngineTensor(name, dtype, shape))
    return inputs, outputs
