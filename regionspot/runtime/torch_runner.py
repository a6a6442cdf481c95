"""A graph as its PyTorch module runs it."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
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
    threads may use it.

    Args:
        module: takes the spec's inputs in their order, returns a tuple of its outputs. It runs
            without gradients and in evaluation mode, which is put back afterwards.
        spec: its tensors.
        device: None stands for that of the module's parameters, asked at each call.
        check: called before each run, to refuse a module that has changed.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: GraphSpec,
        device: torch.device | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.module, self.spec, self._device, self._check = module, spec, device, check

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
        with (
            torch.inference_mode(),
            without_autocast(device.type, warn=True),
            evaluating(self.module),
        ):
            results = self.module(
                *(as_tensor(feeds[name]).to(device) for name in self.spec.input_names)
            )
        kept = () if device.type == "cpu" else keep
        named = zip(self.spec.output_names, results, strict=True)
        return {name: value if name in kept else as_array(value) for name, value in named}

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
    """A tensor over the same memory where that is possible, or the tensor that it already is."""
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.require(value, requirements=("C", "W")))


def as_array(value: Tensor) -> Array:
    """A tensor on the CPU, in float32 if it holds any other floating-point numbers."""
    array: Array = (value.float() if value.is_floating_point() else value).cpu().numpy()
    return array


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
