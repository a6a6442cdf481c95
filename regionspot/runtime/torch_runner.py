"""A graph as its PyTorch module runs it."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.runner import Array, Tensors, check_feeds


class TorchRunner:
    """A `Runner` over a module. What it keeps are tensors on the module's device; on the CPU,
    arrays.

    It computes in the precision of the module's weights: `torch.autocast` around it changes
    nothing, so that results are what the pipeline's precision and fingerprints say. Any number of
    threads may use it. On a GPU arrays go through pinned memory, a run whose outputs are all kept
    waits for nothing, and any other run waits once.

    Args:
        module: takes the spec's inputs in their order, returns a tuple of its outputs. It runs
            without gradients and in evaluation mode, which is put back afterwards.
        spec: its tensors.
        device: None stands for that of the module's parameters, asked at each call.
        check: called before each run, to refuse a module that has changed.
        compiled: run it through `torch.compile`: once for the first shapes, and once more where
            they change, for shapes of any size. Numbers change by rounding.
        own_stream: on a GPU, work on a CUDA stream of its own. A run of arrays then does not wait
            for what the caller's stream still does, such as the run of another graph.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: GraphSpec,
        device: torch.device | None = None,
        check: Callable[[], None] | None = None,
        compiled: bool = False,
        own_stream: bool = False,
    ) -> None:
        self.module, self.spec, self._device, self._check = module, spec, device, check
        self._run: Callable[..., Sequence[Tensor]] = torch.compile(module) if compiled else module
        self._own_stream = own_stream
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._seen: object = None  # the state of the weights that our stream has waited for

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        if self._device is not None:
            return self._device
        first = next(itertools.chain(self.module.parameters(), self.module.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `Runner.infer`. Floating-point outputs are float32, whatever precision the module
        works in.
        """
        check_feeds(self.spec, feeds)
        if self._check is not None:
            self._check()
        device = self.device
        kept = () if device.type == "cpu" else keep
        given = [feeds[name] for name in self.spec.input_names]
        with (
            torch.inference_mode(),
            without_autocast(device.type, warn=True),
            evaluating(self.module),
            self._on_stream(device, given, bool(kept)) as caller,
        ):
            results = self._run(*(on_device(value, device) for value in given))
            outputs: dict[str, Any] = dict(zip(self.spec.output_names, results, strict=True))
            others = [name for name in outputs if name not in kept]
            arrays = as_arrays([outputs[name] for name in others])
            if caller is not None:
                for name in kept:
                    outputs[name].record_stream(caller)
        return outputs | dict(zip(others, arrays, strict=True))

    def fetch(self, kept: Sequence[Any]) -> list[Array]:
        """Copies kept tensors to the host, all in one wait. See `Runner`."""
        with torch.inference_mode(), self._on_stream(self.device, kept, False):
            return as_arrays([as_tensor(value) for value in kept])

    @contextmanager
    def _on_stream(
        self, device: torch.device, given: Sequence[Any], keeps: bool
    ) -> Iterator[torch.cuda.Stream | None]:
        """Runs on our own stream, if there is to be one: after the caller's earlier work where that
        made some of what is given, or the weights, and before its later work where outputs are
        kept. Yields the caller's stream, None where that is where it runs.
        """
        if device.type != "cuda" or not self._own_stream:
            yield None
            return
        caller = torch.cuda.current_stream(device)
        stream = self._streams.get(device)
        if stream is None:
            self._streams[device] = stream = torch.cuda.Stream(device)
        on_gpu = [value for value in given if isinstance(value, Tensor)]
        weights = weights_state(self.module)
        if on_gpu or weights != self._seen:
            stream.wait_stream(caller)
            self._seen = weights
        for value in on_gpu:
            value.record_stream(stream)
        try:
            with torch.cuda.stream(stream):
                yield caller
        finally:
            if keeps:
                caller.wait_stream(stream)

    def close(self) -> None:
        """Nothing to give back: the module is the caller's."""

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def as_tensor(value: Array | Tensor) -> Tensor:
    """A tensor over the same memory where that is possible, or the tensor that it already is.

    Axes of one element have the strides of a new array: compiled code is made again for others.
    """
    if isinstance(value, Tensor):
        return value
    flat = np.require(value, requirements=("C", "W")).ravel()
    return torch.from_numpy(flat).view(value.shape)


def on_device(value: Array | Tensor, device: torch.device) -> Tensor:
    """A tensor there. The copy to a GPU is of pinned memory, which PyTorch gives to no one else
    before it is done, so that nothing waits for it.
    """
    tensor = as_tensor(value)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def as_arrays(tensors: Sequence[Tensor]) -> list[Array]:
    """Tensors on the CPU, in float32 if they hold any other floating-point numbers. Those on a GPU
    are copied on its current stream, into pinned memory, in one wait.
    """
    hosts = []
    for tensor in tensors:
        single = tensor.float() if tensor.is_floating_point() else tensor
        if single.is_cuda:
            pinned = torch.empty(single.shape, dtype=single.dtype, pin_memory=True)
            hosts.append(pinned.copy_(single, non_blocking=True))
        else:
            hosts.append(single.cpu())
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return [host.numpy() for host in hosts]


def weights_state(*parts: nn.Module | Tensor) -> tuple[tuple[int, int], ...]:
    """Changes when a tensor is replaced or written to, without reading its numbers.

    PyTorch counts no writes through `tensor.data`, and none to tensors made in inference mode: they
    go unnoticed.
    """
    tensors = [
        tensor for part in parts for tensor in ([part] if isinstance(part, Tensor) else _held(part))
    ]
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors
    )


def _held(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers. It runs with every request: `modules()` and names would take most of
    its time.
    """
    found: list[Tensor | None] = []
    parts = [module]
    for part in parts:  # which grows meanwhile
        found += part._parameters.values()
        found += part._buffers.values()
        parts += (child for child in part._modules.values() if child is not None)
    return [tensor for tensor in found if tensor is not None]


def without_autocast(device_type: str, warn: bool = False) -> AbstractContextManager[object]:
    """Keeps `torch.autocast` off while it lasts. Exported graphs hold no trace of it.

    Args:
        device_type: "cpu", "cuda", ...
        warn: say so where it was on.
    """
    if torch.compiler.is_exporting() or not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    if warn:
        warnings.warn(
            "torch.autocast has no effect on predictors, pipelines and runners, which work in the "
            "precision of the weights: to work in half precision, make the model with "
            "create_model(..., dtype='bf16')",
            stacklevel=3,
        )
    return torch.autocast(device_type, enabled=False)


_evaluating: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many uses of `evaluating` hold a module that was in training mode."""

_evaluating_lock = threading.Lock()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout while it lasts; each part's own mode is put back after the last of the threads
    that use the part.
    """
    held: list[nn.Module] = []
    try:
        with _evaluating_lock:
            for part in module.modules():
                if part.training or part in _evaluating:
                    _evaluating[part] = _evaluating.get(part, 0) + 1
                    held.append(part)
                    part.training = False
        yield
    finally:
        with _evaluating_lock:
            for part in held:
                _evaluating[part] -= 1
                if not _evaluating[part]:
                    del _evaluating[part]
                    part.training = True
