"""A graph as its PyTorch module runs it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.runner import Array, Tensors, check_feeds


class TorchRunner:
    """A `Runner` over a module. What it keeps are tensors on the module's device; on the CPU, arrays.

    Args:
        module: takes the spec's inputs in their order, returns a tuple of its outputs. It runs without gradients and in
            evaluation mode, which is put back afterwards.
        spec: its tensors.
        device: None stands for that of the module's parameters, asked at each call.
    """

    def __init__(self, module: nn.Module, spec: GraphSpec, device: torch.device | None = None) -> None:
        self.module, self.spec, self._device = module, spec, device

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        if self._device is not None:
            return self._device
        first = next(itertools.chain(self.module.parameters(), self.module.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `Runner.infer`. Floating-point outputs are float32, whatever precision the module works in."""
        check_feeds(self.spec, feeds)
        device = self.device
        with torch.inference_mode(), evaluating(self.module):
            results = self.module(*(as_tensor(feeds[name]).to(device) for name in self.spec.input_names))
        kept = () if device.type == "cpu" else keep
        named = zip(self.spec.output_names, results, strict=True)
        return {name: value if name in kept else as_array(value) for name, value in named}

    def close(self) -> None:
        """Nothing to give back: the module is the caller's."""

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout while it lasts; each part's own mode is put back afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
